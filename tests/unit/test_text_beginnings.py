"""Where the beginnings of a text end in its tokens: found by reading little again, held to reading each whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from dayzero.config import Tokenize
from dayzero.data.chat import ChatEncoder
from dayzero.data.plain_text import TextEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.tiny_tokenizer import TEXT as TRAINING_TEXT
from tests.tiny_tokenizer import tiny_tokenizer
from tests.unit.chat_templates import encode_chat

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
    bpe.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return _trained(bpe, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>", *CONTROLS]))


def legacy(folder: Path) -> PreTrainedTokenizerBase:
    """A space before whatever stands between control tokens."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _trained(bpe, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>", *CONTROLS]))


def unigram(folder: Path) -> PreTrainedTokenizerBase:
    model = Tokenizer(models.Unigram())
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
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


@pytest.mark.parametrize("text", ["fox", " fox", "\n\n42", "\nThe fox", "<|im_end|>", "(a)", "<|im_\ufdd0end|>"])
def test_a_text_that_goes_on_has_no_space_of_a_beginning(encoder: TextEncoder, text: str) -> None:
    lead = encoder.lead(text)
    ids = encoder.ids_after(lead, text)
    words = [encoder.tokenizer.convert_ids_to_tokens(list(part)) for part in (encoder.ids("x").tolist(), ids.tolist())]
    whole = encoder.tokenizer.convert_ids_to_tokens(encoder.ids(f"x{text}").tolist())
    assert "".join([*words[0], *words[1]]) == "".join(whole)
    again, mask = encoder.supervised(text, [(0, len(text))], lead)
    assert again.tolist() == ids.tolist()
    assert mask.all()


VICUNA = (
    "{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}{{ m.content }}"
    "{{ ' ' if m.role == 'user' else '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
"""The space before an answer is the prompt's, and most tokenizers read it as the answer's first word's."""


@pytest.mark.parametrize("reasoning", [True, False])
def test_an_answer_that_merges_with_its_prompt_is_read_apart(encoder: TextEncoder, reasoning: bool) -> None:
    encoder.tokenizer.chat_template = VICUNA
    chat = ChatEncoder(encoder.tokenizer, Tokenize(loss_reasoning=reasoning))
    said = "The fox 42" if reasoning else "<think>fox</think>The fox 42"
    messages = [{"role": role, "content": content} for role, content in [("user", "fox 42"), ("assistant", said)]]
    ids, mask = encode_chat(chat, messages * 2)
    prompt = chat.texts.ids("USER: fox 42 ASSISTANT: ").tolist()
    assert ids[: len(prompt)] == prompt
    words = encoder.tokenizer.convert_ids_to_tokens
    of_answer = "".join(words([i for i, wanted in zip(ids, mask, strict=True) if wanted]))
    assert of_answer.replace("▁", " ").replace("Ġ", " ") == "The fox 42<|im_end|>" * 2
