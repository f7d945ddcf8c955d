"""Weights that are not trained need no float32 master: what a directory stores in bfloat16 stays bfloat16.

FSDP2's bf16 policy keeps float32 masters and computes with bfloat16 copies of them, made anew for every forward and
backward pass. A frozen weight never moves away from what was read, so where that was bfloat16 the copy and the master
are the same numbers: half of the memory, no casts, bit-equal results. Stored in another dtype it keeps its float32
master, since training, export and its check must all start from the same values.

Where no rank shares a weight with another, FSDP2 would still copy it before use; frozen ones are then left out of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def keep_frozen_in_bf16(model: nn.Module, stored_dtype: Callable[[str], torch.dtype | None]) -> None:
    """Make the frozen float32 parameters of the meta-device `model` bfloat16 where `stored_dtype(name)` is."""
    for name, parameter in model.named_parameters():
        plain = type(parameter) is nn.Parameter and parameter.dtype == torch.float32  # not a quantised one
        if plain and not parameter.requires_grad and stored_dtype(name) == torch.bfloat16:
            parameter.data = parameter.data.to(torch.bfloat16)


def frozen_in_bf16(module: nn.Module) -> set[nn.Parameter]:
    """The parameters of which this is true."""
    return {p for p in module.parameters() if not p.requires_grad and p.dtype == torch.bfloat16}


@contextmanager
def in_float32(root: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """While active, frozen bfloat16 parameters that FSDP2 does not manage are float32 in the forward call of `root`:
    those of a layer while it runs, the others all along."""
    units: list[tuple[nn.Module, list[nn.Module]]] = [(layer, list(layer.modules())) for layer in layers]
    inside = {id(module) for _, modules in units for module in modules}
    frozen = {p for p in frozen_in_bf16(root) if not isinstance(p, DTensor)}  # FSDP2's policy casts its own
    units.append((root, [m for m in root.modules() if id(m) not in inside]))
    with ExitStack() as hooks:
        for unit, modules in units:
            places = [
                (module, name)
                for module in modules
                for name, p in module._parameters.items()
                if p is not None and p in frozen
            ]
            before: dict[tuple[int, str], nn.Parameter] = {}
            hooks.callback(unit.register_forward_pre_hook(partial(_cast, places, before)).remove)
            hooks.callback(unit.register_forward_hook(partial(_restore, places, before), always_call=True).remove)
        yield


def _cast(places: list[tuple[nn.Module, str]], before: dict[tuple[int, str], nn.Parameter], *_: Any) -> None:
    made: dict[int, nn.Parameter] = {}  # a tied parameter stays one
    for module, name in places:
        old = module._parameters[name]
        assert old is not None
        before[id(module), name] = old
        if id(old) not in made:
            made[id(old)] = nn.Parameter(old.float(), requires_grad=False)
        module._parameters[name] = made[id(old)]


def _restore(places: list[tuple[nn.Module, str]], before: dict[tuple[int, str], nn.Parameter], *_: Any) -> None:
    for module, name in places:
        if (id(module), name) in before:
            module._parameters[name] = before.pop((id(module), name))
