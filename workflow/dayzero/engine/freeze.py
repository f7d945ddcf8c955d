"""Parts of a model that are not trained, named by patterns.

A frozen parameter has no gradient, no optimizer state and no place in checkpoints: it stays what the base model has, to
the bit.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from dayzero.errors import ConfigError

SHOWN = 3


def frozen_names(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    """The names of the parameters that `patterns` name; of a tied one all names, if one of them is named."""
    named = list(model.named_parameters(remove_duplicate=False))
    frozen = {id(p) for name, p in named for pattern in patterns if fnmatchcase(name, pattern)}
    return {name for name, parameter in named if id(parameter) in frozen}


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Mark the parameters that `patterns` (of fnmatch, over whole names) name as not to be trained, in place.

    Raises `ConfigError` where a pattern names no parameter that would be trained, or where none is left to train.
    """
    patterns = list(patterns)
    trained = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in trained):
            raise ConfigError(
                f"method.freeze {pattern!r} matches no trained parameter: write * for any text; the nearest names are "
                + ", ".join(_nearest(pattern, trained))
            )
    for name in frozen_names(model, patterns) & set(trained):
        trained[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in trained.values()):
        raise ConfigError(
            f"method.freeze {', '.join(patterns)} freezes all {len(trained)} trained parameters: leave some to train, "
            "or set method.name none"
        )


def _nearest(pattern: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    return difflib.get_close_matches(pattern, names, n=SHOWN, cutoff=0.0)
