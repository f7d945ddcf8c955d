"""A byte-level BPE tokenizer trained on a run's own training text, for models that start from random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dayzero.console import log, track
from dayzero.data.documents import COLUMNS
from dayzero.data.stored_table import open_table
from dayzero.errors import ConfigError, DataError
from dayzero.files import read_json, write_json

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train on `texts`; every byte is in the vocabulary, so no text is unknown. The same texts give the same tokenizer.

    It puts BOS before a text, so that a model learns to begin one; EOS is added where documents are made. It has no
    padding token of its own: padding is masked by length, and EOS stands in where a library insists on one.

    Raises ConfigError for a vocab_size without room for all bytes.
    """
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 2
    if vocab_size < smallest:
        raise ConfigError(
            f"model.tokenizer.vocab_size {vocab_size} is below {smallest} (256 bytes, BOS and EOS): set it to "
            f"{smallest} or more"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    if bpe.get_vocab_size() < vocab_size:
        log.warning(
            "the text gives only %d of the %d entries of model.tokenizer.vocab_size", bpe.get_vocab_size(), vocab_size
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write an HF tokenizer directory that older transformers read too."""
    tokenizer.save_pretrained(path)
    config = read_json(path / "tokenizer_config.json")
    # transformers 5 writes a class name of its own that version 4 does not know; both know this one.
    write_json(path / "tokenizer_config.json", {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def training_texts(data: Path) -> Iterator[str]:
    """All texts of a data directory's training split, behind a progress bar; DataError where there are none."""
    manifest: dict[str, Any] = read_json(data / "manifest.json")
    if manifest["format"] == "pretokenized":
        raise ConfigError(
            "model.tokenizer: a tokenizer cannot be trained on pretokenized rows: use the one that made them"
        )
    columns = COLUMNS[manifest["format"]]
    source = data / manifest["splits"]["train"]["file"]
    file = open_table(source)
    if not file.metadata.num_rows:
        raise DataError(f"{data}: no rows to train a tokenizer on: check data.source")
    rows = (row for batch in file.iter_batches(batch_size=256, columns=columns) for row in batch.to_pylist())
    for row in track(rows, "train tokenizer", file.metadata.num_rows):
        for column in columns:
            value = row[column]
            if not isinstance(value, list):
                yield value or ""
                continue
            for message in value:
                yield from (message.get(key) or "" for key in ("reasoning_content", "content", "tool_calls"))
