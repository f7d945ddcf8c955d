"""Tiny models and token rows that several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.token_store import write_token_store

VOCAB_SIZE = 128

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SHAPE, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_SHAPE, "head_dim": 8, "tie_word_embeddings": False},
    "mixtral": {
        "model_type": "mixtral",
        **_SHAPE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_SHAPE,
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        **_SHAPE,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
    "opt": {
        "model_type": "opt",
        **{name: size for name, size in _SHAPE.items() if name not in ("intermediate_size", "num_key_value_heads")},
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
        "dropout": 0.0,
        "tie_word_embeddings": True,
    },
    "stablelm": {"model_type": "stablelm", **_SHAPE, "tie_word_embeddings": False},
    "mamba": {
        "model_type": "mamba",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "state_size": 4,
        "num_hidden_layers": 2,
    },
    "big_bird": {
        "model_type": "big_bird",
        **{name: size for name, size in _SHAPE.items() if name != "num_key_value_heads"},
        "is_decoder": True,
        "attention_type": "original_full",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}
"""Config fields of random models: one with tied embeddings, one with query and key norms and an untied head, one
with a state that packed documents would share, and two mixtures of experts, one with a dense layer among its layers and
a number of experts that 4 ranks do not share evenly; opt and stablelm ship no tensor-parallel plan, big_bird has
weights (of a pooler) that never get a gradient."""


def write_rows(path: Path, *, packed: bool, documents: int = 40, seed: int = 0) -> Path:
    """Token rows with ragged lengths and label counts: some documents supervise one token, some nearly all."""
    if (path / "row_offsets.npy").exists():
        return path
    rng = np.random.default_rng(seed)
    made = []
    for i in range(documents):
        length = int(rng.integers(4, 30))
        first_label = length // 2 if i % 3 == 0 else length - 1 if i % 3 == 1 else 1
        made.append((rng.integers(0, VOCAB_SIZE, length).tolist(), [t >= first_label for t in range(length)]))
    size = 2 if packed else 1
    write_token_store(path, made, [list(range(i, i + size)) for i in range(0, documents, size)])
    return path
