"""Gradients of linear weights computed later than those of the activations, to fill a pipeline's bubbles.

A zero-bubble schedule (Qi et al. 2023, https://arxiv.org/abs/2401.10241) sends the gradient of a stage's input on its
way first and computes the weights' when there is nothing else to do. Here a linear layer's backward pass computes its
input's gradient and notes what its weight's needs; `DeferredGradients.take` hands out those notes as work to do. Any
other parameter has its gradient at once, so every model is right, only more or less of its work can wait.

Shapes: N tokens of all rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DeferredGradients:
    """The notes of the linear modules in the layers of one stage."""

    def __init__(self, layers: nn.Module) -> None:
        self._notes: list[tuple[Tensor, Tensor, Tensor]] = []
        for module in layers.modules():
            if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
                module.forward = partial(self._forward, module)  # type: ignore[method-assign]

    def take(self) -> Callable[[], None]:
        """What the backward passes since the last call have left to do."""
        notes, self._notes = self._notes, []
        return partial(_add_gradients, notes)

    def _forward(self, module: nn.Linear, x: Tensor) -> Tensor:
        if module.weight.requires_grad and torch.is_grad_enabled():
            return _Linear.apply(x, module.weight, module.bias, self._notes_of(module.weight))
        return F.linear(x, module.weight, module.bias)

    def _notes_of(self, weight: Tensor) -> Callable[[Tensor, Tensor], None]:
        return lambda x, gradient: self._notes.append((weight, x, gradient))


class _Linear(torch.autograd.Function):
    """x W^T + b, whose backward pass leaves W's gradient to others."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, note: Callable[[Tensor, Tensor], None]
    ) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.note = note
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        ctx.note(x.detach(), gradient)
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        of_bias = gradient.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias, None


@torch.no_grad()
def _add_gradients(notes: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    while notes:  # each note keeps two activations alive
        weight, x, gradient = notes.pop()
        found = gradient.flatten(0, -2).T @ x.flatten(0, -2)  # [O, N] @ [N, I]
        weight.grad = found if weight.grad is None else weight.grad.add_(found)
