"""Muon: momentum whose matrix is made orthogonal before it is added to the weights.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, with the step size of Liu et al. 2025,
https://arxiv.org/abs/2502.16982. Single-process steps are those of torch.optim.Muon.

The Newton-Schulz iteration needs the whole matrix. Of matrices split by rows over n ranks, n are treated at a time:
each rank collects one of them whole, iterates, and deals out the rows, so that no matrix is iterated twice. Experts
split by expert are treated where they lie. Matrices split in another way (by tp as well) are collected by every rank.

Shapes: O outputs, I inputs, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dayzero.engine.sharded import like, local, zeros

COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the quintic iteration, chosen for a steep slope at zero (Jordan et al.)."""

EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """For matrices [O, I] and stacks of them [E, O, I]; each matrix of a stack is treated by itself. Every group
    says its `weight_decay`, and whether its matrices are `transposed`, [I, O]."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        num_iterations: int = 5,
        adjust_lr: str = "match_rms_adamw",
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov}
        super().__init__(params, {**defaults, "num_iterations": num_iterations, "adjust_lr": adjust_lr})
        self.state_dtype = state_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for batch in _batches([p for p in group["params"] if p.grad is not None]):
                directions = [like(p, self._direction(p, group)) for p in batch]
                orthogonal = orthogonalize_all(directions, group["num_iterations"])
                for parameter, update in zip(batch, orthogonal, strict=True):
                    length = group["lr"] * _length(parameter.shape, group["adjust_lr"], group["transposed"])
                    share = local(parameter)
                    decayed = share.float().mul_(1 - group["lr"] * group["weight_decay"])
                    # of offloaded weights torch may have dealt it out over the GPUs
                    share.copy_(decayed.add_(local(update).to(share.device), alpha=-length))

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """This rank's share of the momentum, in bfloat16 as the iteration computes."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = zeros(parameter, self.state_dtype)
        kept, grad = local(state["momentum_buffer"]), local(parameter.grad).float()
        average = kept.float().lerp(grad, 1 - group["momentum"])
        kept.copy_(average)
        return (grad.lerp(average, group["momentum"]) if group["nesterov"] else average).bfloat16()


def orthogonalize(matrix: Tensor, num_iterations: int) -> Tensor:
    """[..., O, I] -> the same, bfloat16, all singular values between about 0.5 and 1.5."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = multiply_add(x, multiply_add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalize_all(matrices: list[Tensor], num_iterations: int) -> list[Tensor]:
    """`orthogonalize` each of `matrices`, which are split alike; all ranks that hold them call it together."""
    first = matrices[0]
    if not isinstance(first, DTensor):
        return [orthogonalize(m, num_iterations) for m in matrices]
    if first.ndim == 3 and all(p.is_replicate() or p.is_shard(0) for p in first.placements):
        return [like(m, orthogonalize(local(m), num_iterations)) for m in matrices]
    if (axis := _row_axis(first)) is not None:
        shares = _exchange_and_orthogonalize(matrices, first.device_mesh.get_group(axis), num_iterations)
        return [like(m, share) for m, share in zip(matrices, shares, strict=True)]
    return [
        distribute_tensor(
            orthogonalize(m.full_tensor(), num_iterations), m.device_mesh, m.placements, src_data_rank=None
        )
        for m in matrices
        if isinstance(m, DTensor)
    ]


def _batches(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters split alike, as many at a time as ranks share them."""
    kinds: dict[Any, list[Tensor]] = {}
    for p in parameters:
        kind = (p.ndim, p.device_mesh, p.placements) if isinstance(p, DTensor) else (p.ndim,)
        kinds.setdefault(kind, []).append(p)
    for alike in kinds.values():
        axis = _row_axis(alike[0])
        size = alike[0].device_mesh.size(axis) if axis is not None and isinstance(alike[0], DTensor) else 1
        for at in range(0, len(alike), size):
            yield alike[at : at + size]


def _row_axis(matrix: Tensor) -> int | None:
    """The mesh axis over which the rows of a matrix are split, where that is all that is split."""
    if not isinstance(matrix, DTensor) or matrix.ndim != 2:
        return None
    split = [axis for axis, placement in enumerate(matrix.placements) if placement != Replicate()]
    return split[0] if len(split) == 1 and matrix.placements[split[0]] == Shard(0) else None


def _exchange_and_orthogonalize(matrices: list[Tensor], group: dist.ProcessGroup, num_iterations: int) -> list[Tensor]:
    """This rank's rows of each matrix made orthogonal; rank r of `group` iterates the r-th of them."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    shares = [local(m) for m in matrices]
    own = matrices[rank].shape if rank < len(matrices) else torch.Size((0, 0))
    sent = [share.numel() for share in shares] + [0] * (size - len(shares))
    chunk = -(-own[0] // size)
    taken = [max(0, min(chunk, own[0] - r * chunk)) * own[1] for r in range(size)]
    flat = torch.cat([share.flatten() for share in shares])
    whole = flat.new_empty(sum(taken))
    dist.all_to_all_single(whole, flat, taken, sent, group=group)
    if rank < len(matrices):
        whole = orthogonalize(whole.view(own), num_iterations).flatten()
    back = torch.empty_like(flat)
    dist.all_to_all_single(back, whole.contiguous(), sent, taken, group=group)
    return [piece.view_as(share) for piece, share in zip(back.split(sent[: len(shares)]), shares, strict=True)]


def _length(shape: torch.Size, adjust_lr: str, transposed: bool) -> float:
    """How long a step is for a matrix of this shape, as a multiple of the learning rate."""
    outputs, inputs = reversed(shape[-2:]) if transposed else shape[-2:]
    if adjust_lr == "original":
        return math.sqrt(max(1.0, outputs / inputs))
    assert adjust_lr == "match_rms_adamw", adjust_lr
    return 0.2 * math.sqrt(max(outputs, inputs))
