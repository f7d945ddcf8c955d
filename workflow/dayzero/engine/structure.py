"""What is where in a model, discovered from its modules: no class names, no per-model tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dayzero.errors import ConfigError


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that turns token ids into hidden states: the inner PreTrainedModel with the layers that `model` calls.

    `base_model_prefix` is not used: it is wrong for some architectures. Nor is it always the outermost one that is
    called: some heads reach past it.
    Raises `ConfigError` when the model has no such module.
    """
    layers = find_layers(model)
    found = [
        module
        for module in model.modules()
        if module is not model and isinstance(module, PreTrainedModel) and any(m is layers for m in module.modules())
    ]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no decoder module around its layers: use train.loss: cross_entropy"
        )
    return found[0] if len(found) == 1 else _first_called(model, found)


class _Called(Exception):
    """Its argument is the module that was called."""


def _first_called(model: nn.Module, modules: Sequence[nn.Module]) -> nn.Module:
    """Which of `modules` a forward pass calls first. None of them runs; the first of them if none is reached."""

    def stop_in(module: nn.Module) -> Callable[..., None]:
        def forward(*_: Any, **__: Any) -> None:
            raise _Called(module)

        return forward

    own = [module.__dict__.get("forward") for module in modules]
    device = next(model.parameters()).device
    for module in modules:
        module.forward = stop_in(module)
    try:
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    except _Called as called:
        return called.args[0]
    except Exception:
        return modules[0]
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
    return modules[0]


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers: the longest ModuleList that is not inside another one.

    Raises `ConfigError` when there is none.
    """
    best: nn.ModuleList | None = None
    pending: list[nn.Module] = [model]
    while pending:
        for child in pending.pop(0).children():
            if not isinstance(child, nn.ModuleList):
                pending.append(child)
            elif best is None or len(child) > len(best):
                best = child
    if best is None:
        raise ConfigError(
            f"{type(model).__name__} has no list of layers: this architecture is not supported, choose another "
            "model.source (or model.architecture)"
        )
    return best
