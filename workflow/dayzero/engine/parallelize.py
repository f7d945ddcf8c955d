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
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dayzero.config import Train
from dayzero.engine.activation_checkpointing import apply_activation_checkpointing
from dayzero.engine.compiling import compile_layers
from dayzero.engine.context_parallel import recalled
from dayzero.engine.distributed import local_device
from dayzero.engine.document_attention import DOCUMENTS, VARLEN
from dayzero.engine.document_attention import recalled as recalled_documents
from dayzero.engine.expert_parallel import apply_expert_parallel, layer_placement, shard_experts
from dayzero.engine.frozen import frozen_in_bf16
from dayzero.engine.lora_groups import share_inputs
from dayzero.engine.lora_linear import fuse_lora
from dayzero.engine.loss import CausalLMWithLoss
from dayzero.engine.megatron_fsdp import check_megatron_fsdp, shard_module
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.pipeline_cut import Anatomy
from dayzero.engine.pipeline_parallel import Pipeline
from dayzero.engine.precision import mixed_precision_policy
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
        policy = mixed_precision_policy(train.precision, module)
        data_mesh = dims.data_mesh(mesh)
        placement = layer_placement(data_mesh.shape[-1])
        # in a pipeline the next micro-batch needs the weights again at once: gathered for each they would cost too much
        kept: dict[str, Any] = {"reshard_after_forward": False} if pipeline or keep_gathered else {}
        offload: dict[str, Any] = {}
        if train.cpu_offload:
            offload["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        elif dims.unsharded:
            # each rank holds all of them anyway, and FSDP2 would copy them in every forward and backward pass
            kept["ignored_params"] = frozen_in_bf16(module)
        kept |= offload
        if experts:
            shard_experts(experts, dims.data_mesh(expert_mesh), policy, **offload)
        for layer in layers:
            if not _shares_parameters(layer, module):
                fully_shard(layer, mesh=data_mesh, mp_policy=policy, shard_placement_fn=placement, **kept)
        for root in roots:
            fully_shard(root, mesh=data_mesh, mp_policy=policy, **kept)
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


def _shares_parameters(layer: nn.Module, root: nn.Module) -> bool:
    """Whether a parameter of `layer` is also used outside it: such a layer is sharded together with the root."""
    own = {id(p) for p in layer.parameters()}
    inside = {id(m) for m in layer.modules()}
    return any(id(p) in own for m in root.modules() if id(m) not in inside for p in m.parameters(recurse=False))
