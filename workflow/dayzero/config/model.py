"""`model`: which model, from where."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveInt

from dayzero.config.section import Section


class TokenizerTraining(Section):
    """A byte-level BPE tokenizer trained on the run's own training text (for pretraining from scratch)."""

    vocab_size: PositiveInt = 4096
    """Entries in the vocabulary, special tokens included."""


class Model(Section):
    """Which model, from where."""

    source: str | None = None
    """`hf:org/name@revision`, a local HF directory or GGUF file, or `package:NAME==VERSION/path/inside`."""
    sha256: str | dict[str, str] | None = None
    """Expected SHA-256 of the source file, or of each named file of a directory. null: recorded, not checked."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Store the weights in this dtype (GGUF weights are dequantised to it, by default bfloat16). null: as they are."""
    architecture: dict[str, Any] | None = None
    """Fields of a transformers config (with `model_type`) for random weights; only with method.name pretrain."""
    tokenizer: TokenizerTraining | None = None
    """Train a tokenizer on the run's data instead of using the model's own. null: the model's own."""
    chat_template: str | None = None
    """A file with a Jinja chat template that replaces the model's own. null: the model's own."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off: such a model is refused."""
    allow_pickle: bool = False
    """Load pickled weights (.bin, .pt), which can run code when read. Off: only safetensors and GGUF."""
