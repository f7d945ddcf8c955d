"""The tiny tokenizer, for the files that ask for it; a file's tests may give it another chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its directory."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer itself."""
    return AutoTokenizer.from_pretrained(tokenizer_path)
