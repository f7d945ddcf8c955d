"""Can a model's tokens be split over ranks? Asked of a small copy, since a wrong split fails in silence.

Context parallelism replaces attention, and sequence parallelism what stands in front of the split matrices. A layer
that mixes tokens in another way (convolution, state space, linear attention, chunks of its own) would take one rank's
tokens for the whole row, and the run would train another model. No table of architectures: the copy is computed whole
and split, and the logits compared.

Shapes: B rows, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dayzero.engine.context_parallel import (
    check_context_parallel,
    one_rank_with_all,
    places_of,
    use_context_parallel,
)
from dayzero.engine.difference import relative_difference
from dayzero.engine.structure import find_layers
from dayzero.engine.tiny_copy import VOCAB_SIZE, tiny_copy
from dayzero.errors import ConfigError, one_line

ROUNDING = 1e-4
"""As a share of the largest logit. Right splits differ by up to 4e-7, the smallest wrong one seen by 3.5e-4."""
TOKENS = 48


@torch.no_grad()
def require_context_parallel(model: PreTrainedModel, cp: int, method: str) -> None:
    """Raise `ConfigError` where a small copy of `model` computes something else when its tokens come in the order in
    which `cp` ranks hold them, and only attention knows of it; and where `check_context_parallel` does.

    Where no small copy can be made, nothing more is known and nothing raised.
    """
    check_context_parallel(model, cp, method)
    whole, split = tiny_copy(model), tiny_copy(model)
    if whole is None or split is None:
        return
    ids = _row(2 * cp)
    places = torch.arange(ids.shape[1]).unsqueeze(0)
    order = torch.cat(places_of(ids.shape[1], cp))
    wanted = whole(input_ids=ids, position_ids=places, use_cache=False).logits[:, order]
    use_context_parallel(split)
    try:
        with one_rank_with_all(order, places):
            own = split(input_ids=ids[:, order], position_ids=places[:, order], use_cache=False).logits
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"parallelism.cp {cp}: {type(model).__name__} does not compute on tokens in another order "
            f"({one_line(error)}): use dp_shard or tp"
        ) from error
    moved = relative_difference(own, wanted)
    if not moved <= ROUNDING:
        raise ConfigError(
            f"parallelism.cp {cp}: {type(model).__name__} mixes tokens in other ways than the attention that cp "
            f"replaces (logits of a small copy move by {moved:.2g}): use dp_shard or tp"
        )


@torch.no_grad()
def require_sequence_parallel(model: PreTrainedModel, columns: list[str], tp: int) -> None:
    """Raise `ConfigError` where a part of the layers that would see only its rank's tokens mixes tokens.

    `columns`: the modules that are split by columns, by their names in `model`; what holds one sees all tokens. Every
    other part of a layer is tried alone on halves of a row.
    """
    small = tiny_copy(model)
    if small is None:
        return
    gathered = {name.rpartition(".")[0] for name in columns}
    names = {id(module): name for name, module in small.named_modules()}
    for layer in find_layers(small):
        prefix = names[id(layer)]
        for name, module in _parts(layer, prefix, gathered):
            if (moved := _mixes(small, module)) is not None and not moved <= ROUNDING:
                raise ConfigError(
                    f"parallelism.sequence_parallel: {name} ({type(module).__name__}) mixes tokens outside of what tp "
                    f"{tp} splits (its output moves by {moved:.2g}): turn sequence_parallel off"
                )


def _parts(module: nn.Module, name: str, gathered: set[str]) -> list[tuple[str, nn.Module]]:
    """The largest modules within this one that neither are, nor hold, one that sees all tokens."""
    if name in gathered:
        return []
    if not any(other.startswith(f"{name}.") for other in gathered):
        return [(name, module)]
    return [part for child, inner in module.named_children() for part in _parts(inner, f"{name}.{child}", gathered)]


def _mixes(small: PreTrainedModel, module: nn.Module) -> float | None:
    """How far `module`'s output for halves of a row is from that for the row; None where it was not called on one."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    hook = module.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    try:
        ids = _row(2)
        small(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    if not calls:
        return None
    args, kwargs, out = calls[0]
    tokens = ids.shape[1]
    halves = [slice(0, tokens // 2), slice(tokens // 2, tokens)]
    try:
        got = [_first(module(*_cut(args, half, tokens), **_cut(kwargs, half, tokens))) for half in halves]
        whole = _first(out)
        if whole.ndim < 2 or whole.shape[1] != tokens:
            return None
        return relative_difference(torch.cat(got, dim=1), whole)
    except Exception:
        return float("inf")  # what cannot compute on a part of a row


def _cut(value: Any, half: slice, tokens: int) -> Any:
    """Tensors among arguments, [B, T, ...], cut to some of their tokens."""
    if isinstance(value, Tensor):
        return value[:, half] if value.ndim > 1 and value.shape[1] == tokens else value
    if isinstance(value, tuple):
        return tuple(_cut(part, half, tokens) for part in value)
    return {k: _cut(part, half, tokens) for k, part in value.items()} if isinstance(value, dict) else value


def _first(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def _row(multiple: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCAB_SIZE, (1, -(-TOKENS // multiple) * multiple), generator=generator)
