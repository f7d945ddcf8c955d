"""A test double of transformer-engine, which cannot be installed without CUDA: the names and calls that are used.

Its linear module computes what torch's does and notes under which recipe.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

seen: list[str | None] = []
"""The recipe under which each call of a linear ran."""

_active: list[str] = []


class DelayedScaling: ...


class Float8CurrentScaling: ...


class Float8BlockScaling: ...


class MXFP8BlockScaling: ...


RECIPES = (DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling)


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, *, bias: bool, params_dtype: torch.dtype, device: Any) -> None:
        assert isinstance(device, str), "what is no text is not compared with the text meta"
        super().__init__(inputs, outputs, bias=bias, dtype=params_dtype, device=device)

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None: ...

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen.append(_active[-1] if _active else None)
        multiple = 32 if _active[-1:] == ["MXFP8BlockScaling"] else 8
        assert not _active or x.shape[:-1].numel() % multiple == 0, "as the package's assert_dim_for_fp8_exec says"
        return super().forward(x)


@contextmanager
def autocast(*, enabled: bool, recipe: Any) -> Iterator[None]:
    assert enabled
    _active.append(type(recipe).__name__)
    try:
        yield
    finally:
        _active.pop()


def install(monkeypatch: pytest.MonkeyPatch, recipes: Sequence[type] = RECIPES) -> None:
    """Let `import transformer_engine` find the double, with these recipes, for the length of a test."""
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.common",
             "transformer_engine.common.recipe")  # fmt: skip
    modules: dict[str, Any] = {name: ModuleType(name) for name in names}
    for name in names[1:]:
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, modules[name])
    modules[names[1]].Linear, modules[names[1]].autocast = Linear, autocast
    for recipe in recipes:
        setattr(modules[names[3]], recipe.__name__, recipe)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    seen.clear()
