"""Activation checkpointing: keep less of the forward pass and compute it again in the backward pass.

- full: of each layer only its input is kept (Chen et al. 2016, https://arxiv.org/abs/1604.06174).
- every_N: so for every N-th layer, the others keep everything.
- selective: of each layer the results of attention, of communication and of every second matrix product are kept, which
  are dear to compute; the rest (norms, activations, the other products, adapters' thin ones) is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

PRODUCTS = (
    *("aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten._scaled_mm", "aten._grouped_mm"),
    *("dayzero.sum_of_products", "dayzero.sum_with_float8"),
)

THIN = 16
"""A product whose result has so many times fewer columns than its factors share is an adapter's: little to compute."""

KEPT = (
    "aten._scaled_dot_product_",
    "aten._flash_attention_forward",
    "torch_attn._varlen_attn",
    "flex_attention",
    "_c10d_functional.",
    "c10d_functional.",
)
"""Beginnings of the names of operations whose results are kept: attention's (its softmax statistics too), and what came
from other ranks."""


def apply_activation_checkpointing(
    layers: Iterable[nn.Module], setting: str, around: Callable[[], Contexts] | None = None
) -> None:
    """Change the forward call of `layers` as train.activation_checkpointing `setting` says.

    `around`: contexts of the first and of the repeated computation that a layer needs anyway. Not in a graph of the
    compiler's, where both are functions of the same inputs (and it takes no such contexts).
    """
    if setting == "none":
        return
    every = int(setting.removeprefix("every_")) if setting.startswith("every_") else 1
    in_graph = selective_contexts if setting == "selective" else None
    eager = partial(_both, in_graph, around) if in_graph and around else in_graph or around
    for index, layer in enumerate(layers):
        if index % every == 0:
            # on the instance's forward: no wrapper module, so no parameter is renamed, and FSDP2's hooks stay outside
            layer.forward = _checkpointed(layer.forward, _options(eager), _options(in_graph))


def _options(context_fn: Callable[[], Contexts] | None) -> dict[str, Any]:
    return {"use_reentrant": False} | ({} if context_fn is None else {"context_fn": context_fn})


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any], in_graph: dict[str, Any]) -> Callable[..., Any]:
    """A function, not a partial of `checkpoint`: the compiler begins at one, and would pass over the other."""

    @wraps(forward)
    def again(*args: Any, **kwargs: Any) -> Any:
        given = in_graph if torch.compiler.is_compiling() else options
        return checkpoint(forward, *args, **given, **kwargs)

    return again


def selective_contexts() -> Contexts:
    """For one call of a layer: its first and its repeated computation count matrix products in the same order."""
    products = {False: 0, True: 0}

    def policy(context: Any, operation: Any, *args: Any, **_: Any) -> CheckpointPolicy:
        name = str(operation)
        if name.startswith("aten.mm") and args[1].shape[1] * THIN <= args[1].shape[0]:
            return CheckpointPolicy.PREFER_RECOMPUTE
        if name.startswith(PRODUCTS):
            products[context.is_recompute] += 1
            return (
                CheckpointPolicy.MUST_SAVE if products[context.is_recompute] % 2 else CheckpointPolicy.PREFER_RECOMPUTE
            )
        return CheckpointPolicy.MUST_SAVE if name.startswith(KEPT) else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _both(one: Callable[[], Contexts], other: Callable[[], Contexts]) -> Contexts:
    (first, again), (other_first, other_again) = one(), other()
    return _within(first, other_first), _within(again, other_again)


@contextmanager
def _within(inner: AbstractContextManager[Any], outer: AbstractContextManager[Any]) -> Any:
    with outer, inner:
        yield
