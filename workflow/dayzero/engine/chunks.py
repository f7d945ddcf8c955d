"""Losses of many positions, a chunk of them at a time, each chunk's gradients made along with its loss.

Nothing of a chunk is kept but its gradients, and nothing is computed twice, as in Liger's fused loss
(https://arxiv.org/abs/2410.10989), but for whatever the model does behind its decoder: autograd goes through it chunk
by chunk.

Shapes: N label tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dayzero.engine.sharded import like, local

IGNORE = -100

_CACHED = 2**19
"""Logits that are worked on at a time on a CPU, so that they stay in a core's own cache."""
_SCALED = 2**24
"""Elements of a gradient in less than float32 that are scaled at a time, in float32."""


def sum_of_chunks(
    loss: Callable[..., Tensor],
    hidden: Tensor,
    labels: Tensor,
    size: int,
    *more: Tensor,
    weights: Sequence[Tensor] | None = None,
) -> Tensor:
    """Sum of `loss(hidden, labels, *more)` over pieces of `size` positions, float32 scalar.

    Args:
        loss: gives a scalar, whose gradients flow to `hidden` and `weights` only.
        weights: what else it depends on. None: the leaves that are found behind the first piece's loss.
    """
    pieces = zip(*(tensor.split(size) for tensor in (hidden, labels, *more)), strict=True)
    total = hidden.new_zeros((), dtype=torch.float32)
    if not torch.is_grad_enabled():
        for piece in pieces:
            total += loss(*piece)
        return total
    to_hidden: list[Tensor] = []
    to_weights: list[Tensor] = []
    for first, *others in pieces:
        piece = first.detach().requires_grad_(hidden.requires_grad)
        value = loss(piece, *others)
        weights = [w for w in (_leaves(value, piece) if weights is None else weights) if w.requires_grad]
        wanted = [*weights, piece] if hidden.requires_grad else weights
        found = torch.autograd.grad(value, wanted) if wanted else ()
        to_weights = [a.add_(b) for a, b in zip(to_weights, found, strict=False)] or list(found[: len(weights)])
        to_hidden += found[len(weights) :]
        total += value.detach()
    gradients = [*to_weights, torch.cat(to_hidden)] if to_hidden else to_weights
    return _WithGradients.apply(total, gradients, *(weights or ()), *([hidden] if to_hidden else ()))


def _leaves(value: Tensor, piece: Tensor) -> list[Tensor]:
    """The trained weights that `value` was computed from, besides `piece`."""
    found: list[Tensor] = []
    seen: set[Any] = {None}
    waiting: list[Any] = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", piece)) is not piece:
            found.append(leaf)
        waiting += [following for following, _ in node.next_functions]
    return found


class _WithGradients(Function):
    """`value`, whose `gradients` with respect to some tensors are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        assert [g.shape for g in gradients] == [t.shape for t in tensors]
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(like(known, _scaled(local(known), gradient)) for known in ctx.saved_tensors)


def _scaled(tensor: Tensor, by: Tensor) -> Tensor:
    """`tensor` times a float32 scalar that is not itself rounded to the tensor's dtype first, as torch would."""
    if tensor.dtype == by.dtype:
        return tensor * by
    result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    flat = tensor.reshape(-1)
    for part, into in zip(flat.split(_SCALED), result.view(-1).split(_SCALED), strict=True):
        into.copy_(part.float() * by)
    return result


def token_cross_entropy(logits: Tensor, labels: Tensor, z_loss: float = 0.0) -> Tensor:
    """[N, V] and labels [N] -> summed loss, float32: `loss.loss_of_logits`, in fewer passes over the logits."""
    return _CrossEntropy.apply(logits, labels, z_loss)


class _CrossEntropy(Function):
    """The gradient, softmax minus one at the label, takes the place of the probabilities that autograd would keep."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, z_loss: float) -> Tensor:
        loss = logits.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        rows = max(1, _CACHED // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
        for start in range(0, len(logits), rows):
            some = slice(start, start + rows)
            log_probs = torch.log_softmax(logits[some], dim=-1, dtype=torch.float32)
            labelled = (labels[some] != IGNORE).float()
            column = torch.where(labels[some] != IGNORE, labels[some], 0).unsqueeze(1)
            own = log_probs.gather(1, column)
            log_sum = logits[some].gather(1, column).float() - own  # of exponentials
            losses = z_loss * log_sum.square() - own
            loss += (losses.squeeze(1) * labelled).sum()
            if gradient is not None:
                more = 1 + 2 * z_loss * log_sum
                difference = log_probs.exp_().mul_(more) if z_loss else log_probs.exp_()
                difference.scatter_add_(1, column, torch.full_like(own, -1.0))
                gradient[some] = difference.mul_(labelled.unsqueeze(1))
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (known,) = ctx.saved_tensors
        return _scaled(known, gradient), None, None
