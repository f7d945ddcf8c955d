"""The longest sequence that a model takes, by the fields of its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONTEXT_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
"""What the configs of transformers call it."""


def context_field(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """The field that says it and its tokens; None where none does (some say -1 for "any")."""
    fields = ((name, config.get(name)) for name in CONTEXT_LENGTHS)
    return next(((name, tokens) for name, tokens in fields if isinstance(tokens, int) and tokens > 0), None)
