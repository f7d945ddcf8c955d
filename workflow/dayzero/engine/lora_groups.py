"""Which adapted linear modules of a layer take one and the same tensor, as queries, keys and values do.

Found by watching a tiny copy of the model compute, not by names. Such modules are one operation (see `lora_linear.py`):
their input is read once, and the gradients of it are summed where they are made.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dayzero.engine.lora import ADAPTER
from dayzero.engine.lora_linear import FusedLoraLinear, SharedInput
from dayzero.engine.structure import find_layers
from dayzero.engine.tiny_copy import TOKENS, tiny_copy


def share_inputs(model: PreTrainedModel) -> int:
    """Let fused modules of each layer of `model` that take the same tensor be computed together.

    Where in a layer of another kind they do not, each is computed by itself. Returns how many groups there are.
    """
    if not any(isinstance(module, FusedLoraLinear) for module in model.modules()):
        return 0
    groups = 0
    names = same_input(model)
    for layer in find_layers(model):
        modules = dict(layer.named_modules())
        for group in names:
            alike: dict[tuple[Any, ...], list[FusedLoraLinear]] = {}
            for module in (modules.get(name) for name in group):
                if isinstance(module, FusedLoraLinear) and module.shared is None:
                    alike.setdefault(_kind(module), []).append(module)
            for members in alike.values():
                if len(members) > 1:
                    SharedInput(members)
                    groups += 1
    return groups


def _kind(module: FusedLoraLinear) -> tuple[Any, ...]:
    """What modules must have in common to be one operation: scale, kind of weight, width."""
    return module.scaling[ADAPTER], type(module.base_layer), module.in_features


@torch.no_grad()
def same_input(model: PreTrainedModel) -> list[tuple[str, ...]]:
    """Names inside a layer of linear modules that a tiny copy of `model` calls with the same tensor, in their order."""
    small = tiny_copy(model)
    found: dict[tuple[str, ...], None] = {}
    if small is None:
        return []
    for layer in find_layers(small):
        calls: list[tuple[str, Tensor]] = []  # the tensors too: a freed one's id could be another's
        linears = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        hooks = [m.register_forward_pre_hook(partial(_note, calls, name)) for name, m in linears.items()]
        try:
            small(input_ids=TOKENS, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        once = Counter(name for name, _ in calls)
        by_input: dict[int, list[str]] = {}
        for name, x in calls:
            if once[name] == 1:
                by_input.setdefault(id(x), []).append(name)
        found |= dict.fromkeys(tuple(names) for names in by_input.values() if len(names) > 1)
    return list(found)


def _note(calls: list[tuple[str, Tensor]], name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
    if inputs:
        calls.append((name, inputs[0]))
