"""A stage of a pipeline: some of the model's modules, and how the model runs with these alone.

The model stays whole in name: layers, embedding and head of other stages are replaced by modules without parameters, so
numbering, parameter names and the decoder's own code are those of the whole model, and checkpoints fit any pipeline.
A stage runs the decoder with all layers but its own passed through: the first slot hands in what was received, the last
one keeps what is to be sent on.

Shapes: B rows of a micro-batch, T tokens (after cp has split them), D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dayzero.engine.context_parallel import ContextParallel
from dayzero.engine.loss import CausalLMWithLoss
from dayzero.engine.pipeline_cut import Anatomy
from dayzero.engine.sharded import free_gathered
from dayzero.engine.structure import find_decoder


@dataclass
class _Flow:
    """The hidden states [B, T, D] that a stage has received and those it will send."""

    received: Tensor | None = None
    sent: Tensor | None = None


class Absent(nn.Module):
    """Stands where another stage's module is: no parameters, and every other attribute of that module."""

    def __init__(self, original: nn.Module, flow: _Flow) -> None:
        super().__init__()
        self._flow = flow
        object.__setattr__(self, "_original", (original,))  # in a tuple, so that it is no child

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)


class _AbsentEnd(Absent):
    """An embedding elsewhere gives the received hidden states, which have the right shape; a norm its input."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x if self._flow.received is None else self._flow.received


class _AbsentLayer(Absent):
    """A layer elsewhere returns its input, in the form in which layers return it."""

    def __init__(self, original: nn.Module, flow: _Flow, output: tuple[type, int], first: bool, last: bool) -> None:
        super().__init__(original, flow)
        self._output, self._first, self._last = output, first, last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._first and self._flow.received is not None:
            hidden = self._flow.received
        if self._last:
            self._flow.sent = hidden
        kind, length = self._output
        return hidden if kind is Tensor else kind([hidden] + [None] * (length - 1))


class Stage(nn.Module):
    """Some of the model's modules, and how the model runs with these alone. It is the root that FSDP2 shards."""

    def __init__(
        self,
        whole: CausalLMWithLoss,
        found: Anatomy,
        index: int,
        num_stages: int,
        own: range,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        """What is sent on, also where the layers add up in float32."""
        self.is_first, self.is_last = index == 0, index == num_stages - 1
        self.context: ContextParallel | None = None
        self._flow = _Flow()
        self._slots: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
        model = whole.model
        mine: list[nn.Module] = []
        ends = (found.first if self.is_first else ()) + (found.last if self.is_last else ())
        for name in (*found.first, *found.last):
            original = model.get_submodule(name)
            if name in ends:
                mine.append(original)
            self._take(model, name, original if name in ends else _AbsentEnd(original, self._flow))
        layers: list[nn.Module] = []
        for i in range(found.num_layers):
            layer = model.get_submodule(f"{found.layers}.{i}")
            if i in own:
                layers.append(layer)
            else:
                layer = _AbsentLayer(layer, self._flow, found.output, i == 0, i == found.num_layers - 1)
            self._take(model, f"{found.layers}.{i}", layer)
        self.layers, self.ends = nn.ModuleList(layers), nn.ModuleList(mine)
        object.__setattr__(self, "_whole", (whole, find_decoder(model)))  # in a tuple, so that they are no children

    def forward(
        self,
        *received: Tensor,
        input_ids: Tensor,
        labels: Tensor | None,
        position_ids: Tensor,
        row_positions: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D], for the first stage none -> hidden states, or of the last stage the summed loss
        (float32 scalar), or without labels all logits [B, T, V]. `row_positions`: with cp in training, the position ids
        of the rows before cp split them."""
        whole, decoder = self.__dict__["_whole"]
        if row_positions is not None:
            assert self.context is not None
            self.context.enter(row_positions)
        flow = self._flow
        if received:
            flow.received = received[0]
        with self.installed():
            if self.is_last:
                output = whole.run(input_ids, labels, position_ids)
            else:
                decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
                output = cast(Tensor, flow.sent).to(self.dtype).contiguous()
        flow.received = flow.sent = None
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()  # nothing is trained so far, but the next stage's gradient is sent nevertheless
        return output

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While active, the model has this stage's modules and no others."""
        before = [siblings[name] for siblings, name, _ in self._slots]
        self.install()
        try:
            yield
        finally:
            for (siblings, name, _), module in zip(self._slots, before, strict=True):
                siblings[name] = module

    def install(self) -> None:
        """Put this stage's modules into the model."""
        for siblings, name, module in self._slots:
            siblings[name] = module

    def install_own(self) -> None:
        """Put in only those that are really here."""
        for siblings, name, module in self._slots:
            if not isinstance(module, Absent):
                siblings[name] = module

    def _take(self, model: nn.Module, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        self._slots.append((model.get_submodule(parent)._modules, child, module))

    def reshard(self) -> None:
        """Free the gathered weights."""
        free_gathered(self)
