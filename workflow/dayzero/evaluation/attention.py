"""Faster decoding on a CPU for models whose query heads share key and value heads.

Shape legend: B batch, H query heads, K key and value heads, T tokens, S tokens seen so far, D width of a head.

transformers copies keys and values once for every query head whenever there is a mask, at every token: at 16 prompts of
400 tokens two thirds of a step's time (346 instead of 120 ms, SmolLM2-135M, one core). For a single new token the heads
of a group can stand where the query positions do, and nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def decode_without_copies() -> None:
    """Use it wherever a model of this process runs PyTorch's scaled dot product attention."""
    AttentionInterface.register("sdpa", _attention)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """What `sdpa_attention_forward` gives: query [B, H, T, D], key and value [B, K, S, D] to [B, T, H, D]."""
    batch, heads, length, width = query.shape
    one_mask = attention_mask is None or attention_mask.shape[1] == 1  # not one for each head
    special = dropout or more.get("position_bias") is not None or more.get("cache") is not None
    if length != 1 or key.shape[1] == heads or not one_mask or special:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    groups = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    output = torch.nn.functional.scaled_dot_product_attention(
        groups, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(batch, 1, heads, value.shape[-1]), None
