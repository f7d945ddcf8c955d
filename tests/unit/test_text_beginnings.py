"""Where the beginnings of a text end in its tokens: found by reading little again, held to reading each whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from dayzero.data.plain_text import TextEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.tiny_tokenizer import TEXT as TRAINING_TEXT
from tests.tiny_tokenizer import tiny_tokenizer

CONTROLS = ["<|im_start|>", "<|im_end|>", "[/INST]"]
PARTS = ["<|im_", "assistant\n", "user", "The fox", " ", "  ", "\n", "\n\n", "42", "👩\u200d", "e\u0301", "\x00"]
WORDS = st.lists(st.sampled_from([*CONTROLS, *PARTS, "\ufeff"]), max_size=12).map("".join)


def byte_level(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROLS})
    return tokenizer


def _trained(tokenizer: Tokenizer, trainer: trainers.Trainer) -> PreTrainedTokenizerBase:
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", additional_special_tokens=CONTROLS
    )


def sentencepiece(folder: Path) -> PreTrainedTokenizerBase:
    """A space before the first word only, and no borders between words."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _trained(bpe, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>", *CONTROLS]))


def legacy(folder: Path) -> PreTrainedTokenizerBase:
    """A space before whatever stands between control tokens."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _trained(bpe, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>", *CONTROLS]))


def unigram(folder: Path) -> PreTrainedTokenizerBase:
    model = Tokenizer(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "</s>", *CONTROLS]
    return _trained(model, trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>"))


@pytest.fixture(scope="module", params=[byte_level, sentencepiece, legacy, unigram], ids=lambda made: made.__name__)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder(request.param(tmp_path_factory.mktemp("tokenizer")))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=WORDS, data=st.data(), marked=st.booleans())
def test_beginnings_are_those_of_reading_each_whole(
    encoder: TextEncoder, text: str, data: st.DataObject, marked: bool
) -> None:
    text = encoder.mark(text) + "<|im_start|>assistant\n" + text if marked else text
    ends = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=5)))
    ids = encoder.ids(text)
    expected: list[int] = []
    for end in ends:
        prefix = encoder.ids(text[:end])
        if ids[: len(prefix)].tolist() != prefix.tolist():
            break
        expected.append(len(prefix))
    assert encoder.tokens_before(text, ids, ends, encoder.controls(text)) == expected


def test_texts_read_together_are_those_read_alone(encoder: TextEncoder) -> None:
    texts = ["", "The fox", "<|im_start|>user\n 42<|im_end|>", encoder.mark("a <|im_end|> b") + "<|im_end|>"]
    alone = [encoder.ids(text).tolist() for text in texts]
    encoder.learn(texts)
    assert [encoder.ids(text).tolist() for text in texts] == alone
