"""strategy megatron_fsdp: NVIDIA's Megatron-FSDP (the package megatron-fsdp) in place of FSDP2.

It gathers a layer's parameters on a stream of its own, one layer ahead, from one flat buffer for each layer. What is
used is the package's `experimental.fully_shard`, which works on modules in place as FSDP2 does. Weights, gradients and
moments are float32; bf16 means autocast over them.

Its shards follow the flat buffer, so ranks hold unequal numbers of rows, some none. torch does not know where such a
shard lies: before a checkpoint is written or read each shard is told (`locate_shards`), and a whole tensor is put
together with `whole_parameters`, never with `full_tensor`.

What it cannot train is refused: see `check_megatron_fsdp` and `require_gradients`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dayzero.engine.distributed import rank
from dayzero.engine.requirements import require_gpu_and_package
from dayzero.errors import ConfigError

_MARK = "megatron_fsdp_unequal_shards"


def require_megatron_fsdp() -> None:
    """Raise `ConfigError` where the strategy cannot run; starts nothing."""
    require_gpu_and_package("parallelism.strategy megatron_fsdp", "megatron-fsdp", "use fsdp2")


def check_megatron_fsdp(model: nn.Module) -> None:
    """Raise `ConfigError` for a model that the package would train wrongly, or not at all; memory is not needed.

    - Frozen parameters: it frees those of a module that has no others when the backward pass begins, which still needs
      them.
    - Parameters that two modules share: it would part them.
    - Parameters without dimensions: it splits rows.
    """
    owners: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{key}" if prefix else key
            first = owners.setdefault(id(parameter), name)
            problem = None
            if first != name:
                problem = f"{first} and {name} are one parameter, which Megatron-FSDP would train as two"
            elif not parameter.requires_grad:
                problem = f"{name} is frozen, and Megatron-FSDP frees frozen weights while they are still needed"
            elif parameter.ndim == 0:
                problem = f"{name} is a single number, and Megatron-FSDP splits rows"
            if problem:
                raise ConfigError(f"parallelism.strategy megatron_fsdp: {problem}: use fsdp2")


def shard_module(module: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard `module`, which holds its values on the GPU, over the one-dimensional `mesh`, each layer by itself."""
    from megatron_fsdp.experimental import Flat, Placements, fully_shard

    placements = Placements(dp_axes=[0], parameter=[Flat()], gradient=[Flat()], optimizer=[Flat()])
    for layer in layers:
        fully_shard(layer, mesh, placements)
    fully_shard(module, mesh, placements)
    setattr(module, _MARK, True)


def has_unequal_shards(module: nn.Module) -> bool:
    """Whether `shard_module` has sharded it."""
    return getattr(module, _MARK, False)


def adapt_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Have the weights that are computed with follow those that `optimizer` changes."""
    from megatron_fsdp.experimental import fully_shard_optimizer

    fully_shard_optimizer(optimizer)


def require_gradients(module: nn.Module) -> None:
    """Raise `ConfigError` where a parameter has no gradient after a backward pass.

    The package reduces the gradients of a layer when it has all of them: with one missing, none arrives.
    """
    lacking = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    if lacking:
        raise ConfigError(
            f"parallelism.strategy megatron_fsdp: {lacking[0]} and {len(lacking) - 1} other parameters got no "
            "gradient, since Megatron-FSDP drops those of a layer in which any parameter has none: use fsdp2"
        )


def locate_shards(state: Mapping[str, Tensor], *, for_saving: bool) -> dict[str, Tensor]:
    """`state` with a note in each shard which rows of the whole it is, as checkpoints need. All ranks call it together.

    With `for_saving` weights are copied: torch's staging for a background write takes a shard that begins inside a
    larger buffer for one that has memory of its own, and dies ("invalid python storage").
    """
    from megatron_fsdp.uneven_dtensor import preprocess_state_dict_for_uneven_dtensor

    def inside(tensor: Tensor) -> bool:
        return isinstance(tensor, DTensor) and tensor.to_local().storage_offset() > 0

    located = {name: tensor.clone() if for_saving and inside(tensor) else tensor for name, tensor in state.items()}
    preprocess_state_dict_for_uneven_dtensor(located)
    return located


def whole_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Each parameter's name -> the whole of it on rank 0's CPU; empty on other ranks. All ranks call it together."""
    whole = {}
    for name, parameter in module.named_parameters():
        tensor = _whole(cast(DTensor, parameter.detach()))
        if rank() == 0:
            whole[name] = tensor.cpu()
    return whole


def _whole(shard: DTensor) -> Tensor:
    """The rows of all ranks in order; shards are padded to one size, since not every backend gathers unequal ones."""
    local, group = shard.to_local(), shard.device_mesh.get_group()
    rows = [torch.zeros(1, dtype=torch.long, device=local.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, torch.tensor([len(local)], device=local.device), group=group)
    most = max(int(n) for n in rows)
    padded = local.new_zeros(most, *local.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: int(n)] for part, n in zip(parts, rows, strict=True)])
