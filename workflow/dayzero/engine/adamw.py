"""AdamW whose moments have a dtype of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dayzero.engine.sharded import local, zeros


class AdamWInFloat32(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101) for weights and moments of different dtypes.

    torch's own keeps moments in the weights' dtype. Here the step is computed in float32 and weights and moments are
    rounded when they are stored: float32 moments of bfloat16 weights, or the other way round. Every element is updated
    by itself, so shards are updated where they lie.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.state_dtype = state_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = zeros(parameter, self.state_dtype)
                    state["exp_avg_sq"] = zeros(parameter, self.state_dtype)
                state["step"] += 1
                moments = local(state["exp_avg"]), local(state["exp_avg_sq"])
                _update(local(parameter), local(parameter.grad), *moments, state["step"].item(), group)


def _update(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: float, group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    grad = grad.float()
    m = first.float().lerp(grad, 1 - beta1)
    v = second.float().mul(beta2).addcmul_(grad, grad, value=1 - beta2)
    first.copy_(m)
    second.copy_(v)
    denominator = v.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    w = weight.float().mul(1 - group["lr"] * group["weight_decay"])
    weight.copy_(w.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step)))
