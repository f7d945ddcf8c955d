"""Adafactor on whole and on sharded weights: second moments kept as one row and one column of each matrix.

torch.optim.Adafactor refuses DTensors (in torch 2.13: "in-place operations that require placement changes are not
supported"), so the same steps (Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235, in the variant of
torch.optim.Adafactor) are taken on each rank's share: only means over a dim that is split, and the sizes of weights and
updates, are added up over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dayzero.engine.sharded import like, local, mean_over, root_mean_square, with_one
from dayzero.engine.sharded_optimizer import ShardedOptimizer

EPS = torch.finfo(torch.float32).eps
"""Floor of a mean of squared gradients, and the root of a single one's: all of it is computed in float32. That of
bfloat16, which torch takes for such weights, is larger than most squared gradients."""

EPS_SCALE = 1e-3
"""A weight's own size counts as at least this (eps2 of the paper)."""


class Adafactor(ShardedOptimizer):
    """Steps are as large as a share `lr` of the weight's own root mean square, at most `clip_threshold` times it."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        beta2_decay: float = -0.8,
        clip_threshold: float = 1.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "clip_threshold": clip_threshold}
        super().__init__(params, defaults, state_dtype)

    def update(self, weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        state.setdefault("step", torch.zeros(()))
        state["step"] += 1
        step = state["step"].item()
        new_share = step ** group["beta2_decay"]  # 1 - beta2 of this step
        share = local(weight)
        length = root_mean_square(weight, share).clamp(min=EPS_SCALE) * min(group["lr"], step**-0.5)
        squared = grad.square()
        if weight.ndim > 1:
            row = self._keep(state, "row_var", weight, mean_over(weight, squared, -1), -1, new_share)
            column = self._keep(state, "col_var", weight, mean_over(weight, squared, -2), -2, new_share)
            mean = mean_over(with_one(weight, row, -1), row, -2)
            variance = row * column / mean.clamp(min=EPS)
        else:
            variance = self._keep(state, "variance", weight, squared, None, new_share)
        update = variance.clamp(min=EPS * EPS).rsqrt() * grad
        clip = (root_mean_square(weight, update) / group["clip_threshold"]).clamp(min=1.0)
        decayed = share.float().mul_(1 - group["lr"] * group["weight_decay"])
        share.copy_(decayed.sub_(update.mul_(length / clip)))

    def _keep(
        self, state: dict[str, Tensor], name: str, weight: Tensor, new: Tensor, dim: int | None, share: float
    ) -> Tensor:
        """This rank's part of the running mean of `new`, in which `dim` of `weight` has been averaged."""
        if name not in state:
            first = torch.zeros_like(new, dtype=self.state_dtype)
            state[name] = like(weight, first) if dim is None else with_one(weight, first, dim)
        kept = local(state[name])
        average = kept.float().lerp(new, share)
        kept.copy_(average)
        return average
