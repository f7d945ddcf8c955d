"""All parallelism is applied here, in one order. The model's own code stays single-device.

tensor parallelism -> activation checkpointing -> compile -> FSDP2 | DDP

- Tensor parallelism comes first: FSDP2 then shards what is left of each matrix, on the other mesh axes.
- Adapters are in the model already: put in after sharding they would differ between ranks, with no error.
- Activation checkpointing comes before compile, so that the compiler sees (and may fuse) the recomputation.
- Compile comes before FSDP2, so that its hooks stay outside the compiled graphs.
- FSDP2 shards the empty model before it has any memory; DDP copies one that has its values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dayzero.config import Train
from dayzero.engine.loss import CausalLMWithLoss
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.precision import mixed_precision_policy
from dayzero.engine.structure import find_layers
from dayzero.engine.tensor_parallel import apply_tensor_parallel, partial_parameters


def parallelize(
    module: CausalLMWithLoss,
    dims: ParallelDims,
    mesh: DeviceMesh | None,
    train: Train,
    load: Callable[[], None],
) -> tuple[nn.Module, list[nn.Parameter]]:
    """Apply everything that `train` and `dims` ask for to the meta-device `module`, and call `load` to fill it.

    Returns the module to call in the training step and the parameters of whose gradients each tp rank has only a part.
    `mesh` is None for strategy none.
    """
    layers = find_layers(module.model)
    partial_modules: set[int] = set()
    if dims.tp > 1:
        assert mesh is not None
        partial_modules = apply_tensor_parallel(module.model, mesh["tp"], sequence_parallel=dims.sequence_parallel)
    if train.activation_checkpointing == "full":
        for layer in layers:
            # on the instance's forward: no wrapper module, so no parameter is renamed, and FSDP2's hooks stay outside
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    if train.compile:
        for layer in layers:
            layer.compile()

    if dims.strategy == "fsdp2":
        assert mesh is not None
        policy = mixed_precision_policy(train.precision)
        data_mesh = dims.data_mesh(mesh)
        for layer in layers:
            if not _shares_parameters(layer, module):
                fully_shard(layer, mesh=data_mesh, mp_policy=policy)
        fully_shard(module, mesh=data_mesh, mp_policy=policy)
        load()
        return module, partial_parameters(module, partial_modules)
    load()
    if dims.strategy == "ddp":
        return DistributedDataParallel(module, device_mesh=mesh), []
    return module, []


def _shares_parameters(layer: nn.Module, root: nn.Module) -> bool:
    """Whether a parameter of `layer` is also used outside it: such a layer is sharded together with the root."""
    own = {id(p) for p in layer.parameters()}
    inside = {id(m) for m in layer.modules()}
    return any(id(p) in own for m in root.modules() if id(m) not in inside for p in m.parameters(recurse=False))
