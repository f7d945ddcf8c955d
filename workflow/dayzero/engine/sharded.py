"""Weights that are split over ranks: this rank's share, sums over the others, and what is gathered of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.nn.parallel import DistributedDataParallel


def local(tensor: Tensor) -> Tensor:
    """This rank's share of `tensor`, sharing its memory; the tensor itself where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, share: Tensor) -> Tensor:
    """`share` as this rank's part of a tensor of the shape, and split like, `tensor`."""
    if not isinstance(tensor, DTensor):
        return share
    return DTensor.from_local(
        share, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def free_gathered(module: nn.Module) -> None:
    """Free what FSDP2 keeps gathered of the module's weights after a forward pass."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def trained_state(module: nn.Module, *, whole: bool = False, cpu_offload: bool = False) -> dict[str, Tensor]:
    """Name -> tensor of the weights of `module` that are trained, and of its buffers; `whole` ones are gathered.

    torch leaves a frozen weight that is tied in it, under the second of its names.
    """
    asked = StateDictOptions(ignore_frozen_params=True, full_state_dict=whole, cpu_offload=cpu_offload)
    state = cast(dict[str, Tensor], get_model_state_dict(module, options=asked))
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    frozen = {name for name, p in inner.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in state.items() if name not in frozen}


def own_parameters(module: FSDPModule) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of `module` without those of parts that FSDP2 gathers by themselves."""
    assert isinstance(module, nn.Module)
    parts = [m for m in module.modules() if isinstance(m, FSDPModule) and m is not module]
    inside = {id(p) for part in parts for p in cast(nn.Module, part).parameters()}
    return ((name, p) for name, p in module.named_parameters() if id(p) not in inside)


def zeros(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of `dtype`, split like `parameter`."""
    return like(parameter, torch.zeros_like(local(parameter).detach(), dtype=dtype))


def with_last_dim(tensor: Tensor, share: Tensor, size: int) -> Tensor:
    """`share` as this rank's part of a tensor split like `tensor` whose last dim has `size` elements."""
    return _with_dim(tensor, share, tensor.ndim - 1, size, keep_split=True)


def mean_over(tensor: Tensor, share: Tensor, dim: int) -> Tensor:
    """The mean over `dim` of what is split like `tensor`, whose part here is `share`; `dim` is kept, with one element.

    Other dims stay split as they are, so that this rank's part fits its part of `tensor`.
    """
    assert share.shape == local(tensor).shape
    total = share.sum(dim=dim, keepdim=True)
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            if _split_dim(placement, tensor.ndim) == dim % tensor.ndim:
                dist.all_reduce(total, group=tensor.device_mesh.get_group(axis))
    return total / tensor.shape[dim]


def with_one(tensor: Tensor, share: Tensor, dim: int) -> Tensor:
    """What `mean_over` made, as part of a tensor split like `tensor` but for `dim`, of which all ranks hold the one."""
    return _with_dim(tensor, share, dim % tensor.ndim, 1, keep_split=False)


def root_mean_square(tensor: Tensor, share: Tensor) -> Tensor:
    """Over all elements of what is split like `tensor`, whose part here is `share`: a float32 scalar beside it."""
    total = share.float().square().sum()
    if isinstance(tensor, DTensor):
        for axis, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                dist.all_reduce(total, group=tensor.device_mesh.get_group(axis))
    return (total / max(tensor.numel(), 1)).sqrt()


def some_rank_is_empty(tensor: Tensor) -> bool:
    """Whether a rank holds nothing of `tensor`: dims are dealt out in equal pieces until nothing is left."""
    if not isinstance(tensor, DTensor):
        return False
    pieces: dict[int, int] = {}
    for axis, placement in enumerate(tensor.placements):
        if (dim := _split_dim(placement, tensor.ndim)) is not None:
            pieces[dim] = pieces.get(dim, 1) * tensor.device_mesh.size(axis)
    return any((n - 1) * -(-tensor.shape[dim] // n) >= tensor.shape[dim] for dim, n in pieces.items())


def _with_dim(tensor: Tensor, share: Tensor, dim: int, size: int, *, keep_split: bool) -> Tensor:
    if not isinstance(tensor, DTensor):
        return share
    shape = torch.empty([size if d == dim else n for d, n in enumerate(tensor.shape)], device="meta")
    placements = [p if keep_split or _split_dim(p, tensor.ndim) != dim else Replicate() for p in tensor.placements]
    return DTensor.from_local(
        share, tensor.device_mesh, placements, run_check=False, shape=shape.shape, stride=shape.stride()
    )


def _split_dim(placement: Placement, ndim: int) -> int | None:
    dim: int | None = getattr(placement, "dim", None)
    return None if dim is None else dim % ndim
