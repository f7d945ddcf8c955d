"""An exponential moving average of the weights, beside those that are trained.

After each step, average = decay * average + (1 - decay) * weight (Polyak and Juditsky 1992; as in
https://arxiv.org/abs/1412.6980, section 7.2, without the correction for its start: it begins at the initial weights).
It is sharded as the weights are and costs as much memory as they do, in float32. Frozen weights have none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dayzero.engine.float8 import plain_weight
from dayzero.engine.sharded import free_gathered


class Ema:
    """The average of the trained parameters of the (sharded) `module`, which begins at what they are now."""

    @torch.no_grad()
    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module.module if isinstance(module, DistributedDataParallel) else module
        self.decay = decay
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.parameters: list[nn.Parameter] = list(trained.values())
        # in float32 also of bfloat16 weights, which most steps would not move at all
        floats = [weight.to(torch.float32, copy=True) for weight in self._weights()]
        self.averages: dict[str, Tensor] = dict(zip(trained, floats, strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights; call after each optimizer step."""
        for average, weight in zip(self.averages.values(), self._weights(), strict=True):
            average.lerp_(weight.float(), 1 - self.decay)

    def state(self, copies: Mapping[str, str]) -> dict[str, Tensor]:
        """Name -> average for a checkpoint, sharing memory. `copies`: tied ones of a pipeline -> what they are."""
        own = {f"ema.{name}": average for name, average in self.averages.items() if name not in copies}
        return {f"ema.{copies[n]}": average for n, average in self.averages.items() if n in copies} | own

    @torch.no_grad()
    def loaded(self, copies: Mapping[str, str]) -> None:
        """After `state` was loaded: give both places of a tied parameter on one rank the same average."""
        for copy, name in copies.items():
            if copy in self.averages and name in self.averages:
                self.averages[copy].copy_(self.averages[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While active, the module has the averages for weights, rounded where those are bfloat16."""
        kept = [weight.clone() for weight in self._weights()]
        self._put(self.averages.values())
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, weights: Iterable[Tensor]) -> None:
        free_gathered(self.module)  # it would stay what it was
        for weight, own in zip(weights, self._weights(), strict=True):
            own.copy_(weight)

    def _weights(self) -> Iterator[Tensor]:
        """What the parameters hold at present, sharing memory."""
        return (plain_weight(parameter.detach()) for parameter in self.parameters)
