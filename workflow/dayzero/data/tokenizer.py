"""Loading a tokenizer directory, and what it and the model beside it allow."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from jinja2.exceptions import TemplateSyntaxError
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from dayzero.console import log
from dayzero.context_length import context_field
from dayzero.errors import ConfigError, one_line, short
from dayzero.remote_code import require_trusted_code


@dataclass(frozen=True)
class TokenizerSource:
    """Where a tokenizer comes from: small enough to be handed to worker processes, which load it themselves."""

    path: Path
    """A local HF directory."""
    chat_template: str | None = None
    """File with a Jinja template that replaces the tokenizer's own."""
    trust_remote_code: bool = False
    """Run Python code that ships with the tokenizer."""

    def load(self) -> PreTrainedTokenizerBase:
        """The tokenizer, without a length limit; ConfigError where it or the template cannot be read, or code of its
        own may not be run."""
        require_trusted_code(self.path, self.trust_remote_code)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.path, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        except Exception as error:  # each tokenizer class has its own
            raise ConfigError(
                f"cannot load a tokenizer from {self.path} ({error}): use a directory with tokenizer files"
            ) from error
        # Lengths are ours to check: the library would only warn, and some tokenizers state a wrong limit.
        tokenizer.model_max_length = int(1e30)
        if self.chat_template is not None:
            tokenizer.chat_template = read_chat_template(self.chat_template)
            tokenizer.chat_template_file = self.chat_template  # for messages
        return tokenizer

    def describe(self, data_format: str) -> dict[str, Any]:
        """What a manifest says about the tokenizer."""
        tokenizer = self.load()
        template = tokenizer.get_chat_template() if data_format == "messages" else None
        if template and "strftime_now" in template:
            log.warning("the chat template writes today's date: tokens made on another day will differ")
        return {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest() if template else None,
        }


def read_chat_template(path: str | Path) -> str:
    """The text of a Jinja chat template file; ConfigError where it cannot be read, or is no template."""
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.chat_template {path}: {error}: give the path of a Jinja file") from error
    if fault := syntax_fault(template):
        raise ConfigError(f"model.chat_template {path}:{fault[0]}: {fault[1]}: correct the template")
    return template


def syntax_fault(template: str) -> tuple[int, str] | None:
    """The line of a chat template that is no Jinja, and what is wrong there; None for a sound one."""
    try:
        render_jinja_template([], chat_template=template)  # no conversation: it is only compiled, as it will be again
    except TemplateSyntaxError as error:
        return error.lineno, short(error.message or "no template", 300).rstrip(".")
    return None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The texts that the tokenizer reads as control tokens wherever they stand: those it calls special, and those of
    its added tokens that a chat template of its own writes, as many tokenizers call only some of these special."""
    added = list(tokenizer.added_tokens_decoder.values())
    special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return {token for token in special if token} | _in_templates(tokenizer, [token.content for token in added])


def tag_pairs(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The control tokens that are tags in pairs (`<tool_call>`, `</tool_call>`) and that the tokenizer does not call
    special: the markup of what is said in a turn, not of the turns."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    plain = special_tokens(tokenizer) - special - set(tokenizer.all_special_tokens)
    opening = {token for token in plain if token.startswith("<") and f"</{token[1:]}" in plain}
    return opening | {f"</{token[1:]}" for token in opening}


def _in_templates(tokenizer: PreTrainedTokenizerBase, added: Iterable[str]) -> set[str]:
    """The added tokens that stand in the texts of a chat template.

    Words and white space are left out: in a template they are names of roles and line breaks, whatever else was added.
    """
    candidates = [token for token in added if any(not (c.isalnum() or c.isspace()) for c in token)]
    templates = tokenizer.chat_template or {}
    if not candidates or not templates:
        return set()
    pattern = _any_of(candidates)
    named = templates.values() if isinstance(templates, dict) else [templates]
    return {token for template in named for text in _texts_of(template) for token in pattern.findall(text)}


def _texts_of(template: str) -> list[str]:
    """What a template writes as it is, and the strings in its expressions; not its comments."""
    try:
        stream = Environment().lexer.tokenize(template)  # noqa: S701 (never rendered)
        return [token.value for token in stream if token.type in ("data", "string")]
    except TemplateSyntaxError:
        return [template]  # rendering it says more


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def special_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches any control token in a text; None where the tokenizer has none."""
    tokens = special_tokens(tokenizer)
    return _any_of(tokens) if tokens else None


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    """The token ids of each text without BOS or EOS: what `tokenizer(text, add_special_tokens=False)` gives.

    A tokenizer of the `tokenizers` library is asked directly, for all texts at once and without offsets, unless its
    class has a way of its own.
    """
    kind = type(tokenizer)
    usual = getattr(kind, "_encode_plus", None) is getattr(PreTrainedTokenizerFast, "_encode_plus", 0)
    if not (usual and kind.__call__ is PreTrainedTokenizerBase.__call__):
        return [np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32) for text in texts]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [np.array(e.ids, np.int32) for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer by its own habit puts before and after a text (BOS, EOS), found by trying."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    habit = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(habit) - len(plain) + 1):
        if habit[start : start + len(plain)] == plain:
            return habit[:start], habit[start + len(plain) :]
    raise AssertionError(f"special tokens change the tokens of the text: {plain} became {habit}")


def anchors(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts to put before one that goes on, whose tokens are then those after the anchor's own.

    None where a text has the same tokens anywhere. Tokenizers made with SentencePiece (Llama 2, Mistral, Gemma) put
    a space before whatever they are given, so "4" on its own is " 4".
    """

    def joined(first: str, text: str) -> str:
        whole, before = ids(first + text), ids(first)
        return decode(ids("x") + whole[len(before) :])

    def ids(text: str) -> list[int]:
        return [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]] if text else []

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False)).strip()

    wanted = decode(ids("xx"))
    if joined("", "x") == wanted:
        return []
    return [it for it in ("\n", "a", "(") if joined(it, "x") == wanted]


def check_model_limits(path: str | Path, *, seq_len: int | None = None, max_token_id: int | None = None) -> None:
    """Hold row length and token ids against the config.json beside the tokenizer; nothing to check where there is none.

    Raises ConfigError naming both numbers.
    """
    config = _model_config(path)
    context = context_field(config)
    if seq_len is not None and context is not None and seq_len > context[1]:
        raise ConfigError(
            f"tokenize.seq_len {seq_len} exceeds the context length {context[1]} of the model in {path}: "
            f"set it to {context[1]} or less"
        )
    vocab_size = _vocab_size(config)
    if max_token_id is not None and vocab_size is not None and max_token_id >= vocab_size:
        raise ConfigError(
            f"the tokenizer in {path} gave token id {max_token_id}, beyond the model's vocab_size {vocab_size}: "
            "use the tokenizer the model was trained with"
        )


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many token ids there are: the vocab_size of the model beside the tokenizer, else those that it has."""
    return _vocab_size(_model_config(tokenizer.name_or_path)) or len(tokenizer)


def _vocab_size(config: Mapping[str, Any]) -> int | None:
    size = config.get("vocab_size")
    return size if isinstance(size, int) else None


def _model_config(path: str | Path) -> dict[str, Any]:
    file = Path(path) / "config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_text(encoding="utf-8"))
    return {**config, **config.get("text_config", {})}  # models of several modalities keep the decoder's fields there


def check_same_tokens(model: Path, teacher: Path, name: str, trust_remote_code: bool = False) -> None:
    """Raise `ConfigError` where the tokenizers of two model folders give a token other ids; `name`: the teacher's."""
    try:
        theirs = TokenizerSource(teacher, None, trust_remote_code).load().get_vocab()
    except ConfigError as error:
        raise ConfigError(f"method.kd.teacher {name}: it has no tokenizer that loads: {one_line(error)}") from error
    own = TokenizerSource(model, None, trust_remote_code).load().get_vocab()
    if own != theirs:
        other = sorted(
            {token for token, number in [*own.items(), *theirs.items()] if own.get(token) != theirs.get(token)}
        )
        raise ConfigError(
            f"method.kd.teacher {name}: its tokenizer is another one ({len(own)} tokens here, {len(theirs)} there, "
            f"e.g. {other[0]!r} differs): use a teacher with the same tokenizer"
        )
