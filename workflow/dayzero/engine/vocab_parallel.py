"""The loss under tensor parallelism without whole logits: each rank of the tp group has some of the vocabulary.

The head's weight stays whole on each tp rank (FSDP2 shards it over the other axes), tied to the embedding or not. Each
rank multiplies with its own rows of it, so that logits are computed once and kept once over the group. Exchanged are
three numbers for each token: the largest logit, the sum of exponentials and the label's own logit (Shoeybi et al. 2019,
https://arxiv.org/abs/1909.08053, section 3).

Shapes: N label tokens, D model width, V vocabulary, R ranks of the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def own_rows(size: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """[start, stop) of the `size` rows that are this rank's: equal shares, the last perhaps smaller."""
    share = -(-size // dist.get_world_size(group))
    start = min(dist.get_rank(group) * share, size)
    return start, min(start + share, size)


class SumGradients(Function):
    """The same tensor on all ranks, each of which uses it for something else: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class TakeRows(Function):
    """This rank's rows of a tensor that all ranks hold; its gradient is whole again on all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, start: int, stop: int, group: dist.ProcessGroup) -> Tensor:
        ctx.shape, ctx.rows, ctx.group = x.shape, (start, stop), group
        return x[start:stop].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        whole = gradient.new_zeros(ctx.shape)
        whole[slice(*ctx.rows)] = gradient
        dist.all_reduce(whole, group=ctx.group)
        return whole, None, None, None


class VocabParallelCrossEntropy(Function):
    """logits float32 [N, V / R] of the vocabulary from `start` on, labels [N], -100 for none -> summed loss.

    With `z_loss` that many times the squared logarithm of the sum of exponentials is added for each label token.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, start: int, z_loss: float, ignore: int, group: dist.ProcessGroup
    ) -> Tensor:
        largest = logits.amax(dim=-1) if logits.shape[1] else logits.new_full(labels.shape, -torch.inf)  # [N]
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        exponentials = (logits - largest.unsqueeze(1)).exp_()
        here = (labels >= start) & (labels < start + logits.shape[1])
        column = torch.where(here, labels - start, 0).unsqueeze(1)  # [N, 1]
        own = logits.gather(1, column).squeeze(1) - largest if logits.shape[1] else torch.zeros_like(largest)
        sums = torch.stack([exponentials.sum(dim=-1), torch.where(here, own, 0.0)])  # [2, N]
        dist.all_reduce(sums, group=group)
        supervised = labels != ignore
        log_sum = sums[0].log() + largest
        ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(1)), column, here, supervised, log_sum)
        ctx.z_loss = z_loss
        losses = sums[0].log() - sums[1] + z_loss * log_sum.square()
        return torch.where(supervised, losses, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        probabilities, column, here, supervised, log_sum = ctx.saved_tensors
        result = probabilities * (1 + 2 * ctx.z_loss * log_sum).unsqueeze(1)
        if result.shape[1]:
            result.scatter_add_(1, column, -here.to(result.dtype).unsqueeze(1))
        return result * (gradient * supervised).unsqueeze(1), None, None, None, None, None
