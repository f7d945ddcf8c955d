"""Context parallelism: the tokens of a row are split over the cp axis; only attention looks beyond a rank's own tokens.

Every rank holds one piece of the row's head and one of its tail, so that under causal attention all have equal work.
Whatever the order of tokens, who may see whom follows from two numbers a token has: its document and its place.

- allgather: every rank collects all keys and values. One collective; memory for the whole row's keys and values.
- ulysses: an all-to-all turns "all heads of some tokens" into "all tokens of some heads" and back (Jacobs et al. 2023,
  https://arxiv.org/abs/2309.14509). cp must divide the attention heads.
- ring: keys and values travel round the ranks, one other rank's held at a time: see `ring_attention.py`.

Shapes: B rows, T tokens of the whole row, L = T / cp tokens of this rank, H query heads, K key and value heads, E head
width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _functional_collectives
from torch.distributed._functional_collectives import all_to_all_single_autograd
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from dayzero.engine.ring_attention import ring_attention
from dayzero.engine.sdpa_order import takes_groups_under_a_mask
from dayzero.errors import ConfigError

NAME = "dayzero_context_parallel"
_newest = getattr(_functional_collectives, "all_gather_single_autograd", None)  # the other one's name since torch 2.13
all_gather = _newest or _functional_collectives.all_gather_tensor_autograd
_DROPOUTS = ("attention_dropout", "attn_pdrop")
"""What configs call the dropout of attention's weights."""
_REFUSED = ("softcap", "s_aux", "sinks")
"""What some attentions add to the scores and these do not compute."""


@dataclass
class _State:
    """What the attention of the present forward pass must know of the whole row."""

    group: dist.ProcessGroup | None
    method: str
    order: list[Tensor]
    """For each rank the places [L] of its tokens in the row."""
    documents: Tensor
    """[B, T] which document each token of the row belongs to."""


@dataclass(frozen=True)
class _Score:
    """What an attention layer asks for."""

    scale: float
    dropout: float
    window: int | None
    """Sliding window in tokens."""


_state: _State | None = None


def use_context_parallel(model: PreTrainedModel) -> None:
    """Let `model`, which passed `check_context_parallel`, attend through this module."""
    model.set_attn_implementation(NAME)


def check_context_parallel(model: PreTrainedModel, cp: int, method: str) -> None:
    """Raise `ConfigError` where the model's attention cannot be replaced, ulysses cannot split its heads, or the model
    asks for a dropout that a ring has not."""
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(
            f"parallelism.cp {cp}: the attention of {type(model).__name__} cannot be replaced: use dp_shard or tp"
        )
    config = model.config.get_text_config()
    for name in _DROPOUTS:
        if method == "ring" and (dropout := getattr(config, name, None)):
            raise ConfigError(
                f"parallelism.cp_method ring: the model has {name} {dropout}, and a ring has no dropout of attention: "
                "use allgather or ulysses"
            )
    heads = config.num_attention_heads
    if method == "ulysses" and heads % cp:
        raise ConfigError(
            f"parallelism.cp {cp}: ulysses splits num_attention_heads {heads} / {cp} = {heads / cp:.4g}: "
            f"use a divisor of {heads}, or cp_method ring or allgather"
        )


class ContextParallel:
    """Splits rows over the ranks of `group` and lets attention find the rest of them."""

    def __init__(self, group: dist.ProcessGroup, method: str) -> None:
        self.group, self.method = group, method
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def split(self, tensor: Tensor) -> Tensor:
        """[B, T] -> this rank's [B, L]; T must be a multiple of 2 cp."""
        return tensor[:, places_of(tensor.shape[1], self.size)[self.rank].to(tensor.device)]

    def join(self, local: Tensor) -> Tensor:
        """[B, L, ...] of every rank -> [B, T, ...] in the row's order, without gradient."""
        pieces = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(pieces, local.contiguous(), group=self.group)
        whole = torch.cat(pieces, dim=1)
        return whole[:, torch.cat(places_of(whole.shape[1], self.size)).argsort().to(local.device)]

    def enter(self, position_ids: Tensor) -> None:
        """Tell attention of the row that comes next. position_ids [B, T] restart with each document."""
        global _state
        order = [places.to(position_ids.device) for places in places_of(position_ids.shape[1], self.size)]
        _state = _State(self.group, self.method, order, _documents(position_ids))


def places_of(tokens: int, size: int) -> list[Tensor]:
    """For each of `size` ranks the places [tokens / size] that its tokens have in the row: a piece of the head and one
    of the tail."""
    pieces = torch.arange(tokens).chunk(2 * size)
    return [torch.cat([pieces[r], pieces[2 * size - 1 - r]]) for r in range(size)]


@contextmanager
def one_rank_with_all(order: Tensor, position_ids: Tensor) -> Iterator[None]:
    """For trying a model without other ranks: in the block attention expects the row's tokens [B, T] in that `order`
    [T]. position_ids [B, T] are the row's."""
    with _as_before(_State(None, "whole", [order], _documents(position_ids))):
        yield


def _documents(position_ids: Tensor) -> Tensor:
    return (position_ids == 0).cumsum(dim=1)


def recalled() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For activation checkpointing (its `context_fn`): what is computed again attends as it did the first time, also
    where other rows have passed since, as in a pipeline."""
    return nullcontext(), _as_before(_state)


@contextmanager
def _as_before(state: _State | None) -> Iterator[None]:
    global _state
    present, _state = _state, state
    try:
        yield
    finally:
        _state = present


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [B, H, L, E], key and value [B, K, L, E] -> [B, L, H, E].

    Raises `ConfigError` for attention that adds something to the scores that is not computed here.
    """
    assert _state is not None
    assert attention_mask is None
    for option in _REFUSED:
        if options.get(option) is not None:
            raise ConfigError(
                f"parallelism.cp: the attention of {type(module).__name__} uses {option}, which that of cp lacks: use "
                "dp_shard"
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    score = _Score(scale, dropout, options.get("sliding_window"))
    output = _METHODS[_state.method](_state, query, key, value, score)
    return output.transpose(1, 2).contiguous(), None


def _allgather(state: _State, query: Tensor, key: Tensor, value: Tensor, score: _Score) -> Tensor:
    assert state.group is not None
    keys, values = (all_gather(x.contiguous(), 2, state.group) for x in (key, value))
    rank = dist.get_rank(state.group)
    mask = _visible(state, state.order[rank], torch.cat(state.order), score.window)
    return _attend(query, keys, values, mask, score)


def _ulysses(state: _State, query: Tensor, key: Tensor, value: Tensor, score: _Score) -> Tensor:
    assert state.group is not None
    cp = dist.get_world_size(state.group)
    if key.shape[1] % cp:  # fewer key heads than ranks: each query head gets its own copy
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    q, k, v = (_heads_to_tokens(x, state.group, cp) for x in (query, key, value))
    places = torch.cat(state.order)
    mask = _visible(state, places, places, score.window)
    return _tokens_to_heads(_attend(q, k, v, mask, score), state.group, cp)


def _ring(state: _State, query: Tensor, key: Tensor, value: Tensor, score: _Score) -> Tensor:
    assert state.group is not None
    assert not score.dropout, "refused before"
    rank = dist.get_rank(state.group)

    def seen(other: int) -> Tensor:
        return _visible(state, state.order[rank], state.order[other], score.window)

    return ring_attention(query, key, value, score.scale, state.group, seen)


def _whole(state: _State, query: Tensor, key: Tensor, value: Tensor, score: _Score) -> Tensor:
    places = torch.cat(state.order)
    return _attend(query, key, value, _visible(state, places, places, score.window), score)


_METHODS = {"whole": _whole, "allgather": _allgather, "ulysses": _ulysses, "ring": _ring}


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, score: _Score) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if grouped and not takes_groups_under_a_mask(query):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=score.dropout, scale=score.scale, enable_gqa=grouped
    )


def _visible(state: _State, queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """[B, 1, queries, keys]: the same document, not later, and within the sliding window if there is one."""
    distance = queries[:, None] - keys[None, :]
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    same = state.documents[:, queries, None] == state.documents[:, None, keys]
    return (same & seen).unsqueeze(1)


def _heads_to_tokens(x: Tensor, group: dist.ProcessGroup, cp: int) -> Tensor:
    """[B, H, L, E] -> [B, H / cp, T, E], tokens in the ranks' order."""
    b, h, tokens, e = x.shape
    by_target = x.view(b, cp, h // cp, tokens, e).transpose(0, 1).contiguous()
    got = all_to_all_single_autograd(by_target, None, None, group).view(cp, b, h // cp, tokens, e)
    return got.permute(1, 2, 0, 3, 4).reshape(b, h // cp, cp * tokens, e)


def _tokens_to_heads(x: Tensor, group: dist.ProcessGroup, cp: int) -> Tensor:
    """[B, H / cp, T, E] -> [B, H, L, E]: the way back."""
    b, h, tokens, e = x.shape
    by_target = x.view(b, h, cp, tokens // cp, e).permute(2, 0, 1, 3, 4).contiguous()
    got = all_to_all_single_autograd(by_target, None, None, group).view(cp, b, h, tokens // cp, e)
    return got.transpose(0, 1).reshape(b, cp * h, tokens // cp, e)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
