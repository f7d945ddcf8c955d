"""AdamW whose moments have a dtype of their own."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dayzero.engine.sharded import local, zeros
from dayzero.engine.sharded_optimizer import ShardedOptimizer


class AdamWInFloat32(ShardedOptimizer):
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
        state_dtype: torch.dtype,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps}
        super().__init__(params, defaults, state_dtype)

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = zeros(weight, self.state_dtype)
            state["exp_avg_sq"] = zeros(weight, self.state_dtype)
        state["step"] += 1
        step = state["step"].item()
        share, first, second = local(weight), local(state["exp_avg"]), local(state["exp_avg_sq"])
        beta1, beta2 = group["betas"]
        m = first.float().lerp(grad, 1 - beta1)
        v = second.float().mul(beta2).addcmul_(grad, grad, value=1 - beta2)
        first.copy_(m)
        second.copy_(v)
        denominator = v.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        w = share.float().mul(1 - group["lr"] * group["weight_decay"])
        share.copy_(w.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step)))
