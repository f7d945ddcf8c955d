"""What optimizers of our own share: a step over every parameter, on this rank's share of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dayzero.engine.sharded import local


class ShardedOptimizer(torch.optim.Optimizer):
    """Moments are kept in `state_dtype`; steps are computed in float32. Every group says its `weight_decay`."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], state_dtype: torch.dtype) -> None:
        super().__init__(params, defaults)
        self.state_dtype = state_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, local(parameter.grad).float(), self.state[parameter], group)

    @abstractmethod
    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Step the parameter `weight`, given this rank's share of its gradient, float32, and its own `state`."""
