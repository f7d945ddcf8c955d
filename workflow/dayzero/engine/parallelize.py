"""All parallelism is applied here, in one order. The model's own code stays single-device.

pipeline -> tensor parallelism -> expert parallelism -> activation checkpointing -> compile
-> FSDP2 | DDP | Megatron-FSDP

- The pipeline comes first: what a rank does not hold need not be split, wrapped or sharded.
- Tensor parallelism comes before FSDP2, which then shards what is left of each matrix, on the other mesh axes.
- Expert parallelism splits only experts, tensor parallelism only what is around them. The experts that a rank keeps get
  an FSDP2 mesh of their own, inside that of their layer.
- Adapters are in the model already: put in after sharding they would differ between ranks, with no error.
- A linear module and its adapter become one operation where nothing acts on the modules inside.
- Activation checkpointing comes before compile, so that the compiler sees (and may fuse) the recomputation.
- Compile comes before FSDP2, so that its hooks stay outside the compiled graphs.
- FSDP2 shards the empty model before it has any memory; DDP copies, and Megatron-FSDP shards, one that has its values.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from dayzero.config import Train
from dayzero.engine.activation_checkpointing import apply_activation_checkpointing
from dayzero.engine.compiling import compile_layers
from dayzero.engine.context_parallel import recalled
from dayzero.engine.distributed import local_device
from dayzero.engine.document_attention import DOCUMENTS, VARLEN
from dayzero.engine.document_attention import recalled as recalled_documents
from dayzero.engine.expert_parallel import apply_expert_parallel
from dayzero.engine.fsdp2 import apply_fsdp2
from dayzero.engine.lora_groups import share_inputs
from dayzero.engine.lora_linear import fuse_lora
from dayzero.engine.loss import CausalLMWithLoss
from dayzero.engine.megatron_fsdp import check_megatron_fsdp, shard_module
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.pipeline_cut import Anatomy
from dayzero.engine.pipeline_parallel import Pipeline
from dayzero.engine.structure import find_layers
from dayzero.engine.tensor_parallel import apply_tensor_parallel, partial_parameters


def parallelize(
    module: CausalLMWithLoss,
    dims: ParallelDims,
    mesh: DeviceMesh | None,
    train: Train,
    load: Callable[[], None],
    found: Anatomy | None = None,
    *,
    keep_gathered: bool = False,
) -> tuple[nn.Module, list[nn.Parameter], Pipeline | None]:
    """Apply everything that `train` and `dims` ask for to the meta-device `module`, and call `load` to fill it.

    Returns the module to call in the training step, the parameters of whose gradients each tp rank has only a part, and
    with pp the pipeline that trains. `mesh` is None for strategy none; `found` says where a pipeline cuts the model;
    `keep_gathered`: whether FSDP2 frees nothing after a forward pass.
    """
    pipeline: Pipeline | None = None
    roots: list[nn.Module] = [module]
    layers: list[nn.Module] = list(find_layers(module.model))
    if dims.pp > 1:
        assert mesh is not None
        assert found is not None
        pipeline = Pipeline(module, found, dims, mesh.get_group("pp"), local_device(), train.precision)
        roots = list(pipeline.stages)
        layers = [layer for stage in pipeline.stages for layer in stage.layers]
    partial_modules: set[int] = set()
    if dims.tp > 1:
        assert mesh is not None
        partial_modules = apply_tensor_parallel(module.model, mesh["tp"], sequence_parallel=dims.sequence_parallel)
    experts: list[nn.Module] = []
    expert_mesh: DeviceMesh | None = None
    if dims.ep > 1:
        assert mesh is not None
        expert_mesh = dims.build_expert_mesh(mesh.device_type)
        experts = apply_expert_parallel(module.model, expert_mesh["ep"])
    if dims.tp == dims.pp == 1:
        fuse_lora(module)
        share_inputs(module.model)
    around = None
    if pipeline and dims.cp > 1:
        around = recalled
    elif module.model.config._attn_implementation in (DOCUMENTS, VARLEN):
        around = recalled_documents
    apply_activation_checkpointing(layers, train.activation_checkpointing, around)
    if train.compile:
        compile_layers(layers)

    if dims.strategy == "fsdp2":
        assert mesh is not None
        apply_fsdp2(
            module,
            roots,
            layers,
            dims.data_mesh(mesh),
            train,
            experts=experts,
            expert_mesh=dims.data_mesh(expert_mesh) if expert_mesh is not None else None,
            unsharded=dims.unsharded,
            # in a pipeline the next micro-batch needs the weights again at once: gathered for each they cost too much
            keep_gathered=keep_gathered or pipeline is not None,
        )
        load()
        return module, partial_parameters(module, partial_modules), pipeline
    if dims.strategy == "megatron_fsdp":
        assert mesh is not None
        check_megatron_fsdp(module.model)
        load()
        shard_module(module, layers, mesh)
        return module, [], None
    load()
    if dims.strategy == "ddp":
        return DistributedDataParallel(module, device_mesh=mesh), [], None
    return module, [], None
