"""Source rows -> documents: token ids and loss mask, at most `seq_len` long, with a count of everything left out.

How a document is made, by format:

    text               the tokenizer's own prefix (BOS, where it has one), the text, EOS; all supervised
    prompt_completion  prefix, the prompt, the completion, EOS; completion and EOS supervised. The two are tokenised
                       apart, so that the prompt's tokens are those seen at inference, and the completion's are those
                       of a text that goes on
    messages           see chat.py
    pretokenized       the ids and the loss mask as they are

A document's first token is never supervised: nothing stands before it to predict it from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from dayzero.config import Tokenize
from dayzero.config_checks import LOSS_KEYS
from dayzero.data.chat import ChatEncoder, Rendered
from dayzero.data.conversations import load_messages
from dayzero.data.plain_text import Ids, Mask, TextEncoder
from dayzero.data.tokenizer import affixes, num_token_ids
from dayzero.errors import ConfigError, DataError

COLUMNS = {"text": ["text"], "prompt_completion": ["prompt", "completion"], "messages": ["messages"]}
COLUMNS["pretokenized"] = ["input_ids", "loss_mask"]
"""The columns that each format reads."""
OPTIONAL_COLUMNS = ["tools"]
"""Columns that are read where they are there."""

Document = tuple[Ids, Mask]
_NOTHING: Document = np.empty(0, np.int32), np.empty(0, np.bool_)
_T = TypeVar("_T")


class DocumentEncoder:
    """Encodes rows of one format.

    `counts` says how many rows were `truncated`, `split`, `dropped.empty` (no text), `dropped.too_long`, how many
    documents were `dropped.few_labels`, and in how many rows the texts hold control tokens (`special_token_text`).
    With `reject`, `rejected` holds (origin, reason, row) of rows that cannot be encoded, `dropped.rejected` of them.

    Raises ConfigError where the tokenizer has no EOS or chat template that the format needs.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, data_format: str, options: Tokenize, *, reject: bool = False
    ) -> None:
        self.tokenizer, self.format, self.options = tokenizer, data_format, options
        self.rejected: list[tuple[str, str, Mapping[str, Any]]] = []
        self._reject = reject
        self.counts: Counter[str] = Counter()
        # by the rows' identities, while those are at hand; or why it cannot be
        self._rendered: dict[int, Rendered | ConfigError | DataError | None] = {}
        if data_format == "messages":
            self._chat = ChatEncoder(tokenizer, options)
            self._texts = self._chat.texts
            return
        defaults = Tokenize()
        for name in LOSS_KEYS:
            if getattr(options, name) != getattr(defaults, name):
                raise ConfigError(
                    f"tokenize.{name} is only for conversations, this data is kept as {data_format}: leave it out"
                )
        if data_format == "pretokenized":
            self._num_token_ids = num_token_ids(tokenizer)
            return
        self._texts = TextEncoder(tokenizer)
        self._prefix = np.array(affixes(tokenizer)[0], np.int32)
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer in {tokenizer.name_or_path} has no EOS token to end a document of format {data_format} "
                "with: name an eos_token in its tokenizer_config.json"
            )
        self._eos = np.array([tokenizer.eos_token_id], np.int32)

    def encode_rows(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Document]]:
        """(index of the row, document) for many rows; see `encode`. Their texts go to the tokenizer in one call.

        Rows that `encode` raises DataError for are set aside where that was asked for.
        """
        if self.format in ("text", "prompt_completion"):
            texts = {self._marked(row[c]) for row in rows for c in COLUMNS[self.format] if row.get(c)}
            for anchor in self._texts.anchors[:1] if self.format == "prompt_completion" else []:
                texts |= {anchor + self._marked(row["completion"]) for row in rows if row.get("completion")}
            self._texts.learn(texts)
        elif self.format == "messages":
            self._rendered = {id(row): self._render_or_say_why(row) for row in rows if row.get("messages") is not None}
            self._chat.learn(rendered for rendered in self._rendered.values() if isinstance(rendered, Rendered))
        for index, row in enumerate(rows):
            try:
                documents = list(self.encode(row))
            except DataError as error:
                if not self._reject:
                    raise
                self.rejected.append((_origin(row), str(error.__cause__ or error), row))
                self.counts["dropped.rejected"] += 1
                continue
            for document in documents:
                yield index, document
        self._rendered = {}

    def encode(self, row: Mapping[str, Any]) -> Iterator[Document]:
        """The documents of one row: none, one, or several where a long one is split.

        Raises DataError or ConfigError naming the row.
        """
        ids, mask = self._of_row(row, getattr(self, f"_{self.format}"))
        if not len(ids):
            self.counts["dropped.empty"] += 1
            return
        for part_ids, part_mask in self._fit(ids, mask):
            part_mask[0] = False
            if np.count_nonzero(part_mask) < self.options.min_label_tokens:
                self.counts["dropped.few_labels"] += 1
            else:
                yield part_ids, part_mask

    def _of_row(self, row: Mapping[str, Any], make: Callable[[Mapping[str, Any]], _T]) -> _T:
        """What `make` makes of a row that has its columns; errors name the row."""
        where = f"row {_origin(row)}"
        for column in COLUMNS[self.format]:
            if row.get(column) is None:
                raise DataError(f"{where}: no value in column {column}: fill it or remove the row")
        try:
            return make(row)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{where}: {error}") from error

    def _fit(self, ids: Ids, mask: Mask) -> Iterator[Document]:
        n, policy = self.options.seq_len, self.options.long_documents
        if len(ids) <= n:
            yield ids, mask
        elif policy == "truncate":
            self.counts["truncated"] += 1
            yield ids[:n], mask[:n]  # the EOS goes too: the text does not end here
        elif policy == "split":
            self.counts["split"] += 1
            yield from ((ids[i : i + n], mask[i : i + n]) for i in range(0, len(ids), n))
        else:
            self.counts["dropped.too_long"] += 1

    def _text(self, row: Mapping[str, Any]) -> Document:
        self._count_special(row["text"])
        if not row["text"]:
            return _NOTHING
        ids = self._with_prefix(self._ids(row["text"]))
        ids = self._with_eos(ids)
        return ids, np.ones(len(ids), np.bool_)

    def _prompt_completion(self, row: Mapping[str, Any]) -> Document:
        self._count_special(row["prompt"], row["completion"])
        if not row["prompt"] and not row["completion"]:
            return _NOTHING
        prompt = self._with_prefix(self._ids(row["prompt"]))
        said = self._marked(row["completion"])
        completion = self._with_eos(self._texts.ids_after(self._texts.lead(said) if row["prompt"] else "", said))
        ids = np.concatenate([prompt, completion])
        return ids, np.arange(len(ids)) >= len(prompt)

    def _messages(self, row: Mapping[str, Any]) -> Document:
        rendered = self._rendered[id(row)] if id(row) in self._rendered else self._render(row)
        if isinstance(rendered, Exception):
            raise rendered
        return self._chat.tokenize(rendered) if rendered else _NOTHING

    def _render_or_say_why(self, row: Mapping[str, Any]) -> Rendered | ConfigError | DataError | None:
        try:
            return self._render(row)
        except (ConfigError, DataError) as error:
            return error

    def _render(self, row: Mapping[str, Any]) -> Rendered | None:
        """The conversation of a row; None where it is empty."""
        messages, tools = load_messages(row)
        for i, message in enumerate(messages, start=1):
            if "role" not in message or "content" not in message:
                raise DataError(f"message {i} has no role or content: fill it or remove the row")
        self._count_special(*_texts_of(row))
        if not messages:
            return None
        self._chat.counts.clear()
        rendered = self._chat.render(messages, tools)
        self.counts.update(self._chat.counts)
        return rendered

    def _pretokenized(self, row: Mapping[str, Any]) -> Document:
        ids = np.array(row["input_ids"], np.int32)
        if ids.max(initial=-1) >= self._num_token_ids:
            at = int(np.argmax(ids >= self._num_token_ids))
            raise DataError(
                f"token {at + 1} has the id {ids[at]}, but the model's are below {self._num_token_ids}: tokenise the "
                "row with the model's own tokenizer, take it out, or set such rows aside (data.on_bad_row: reject)"
            )
        return ids, np.array(row["loss_mask"], np.bool_)

    def _marked(self, text: str) -> str:
        return self._texts.mark(text) if self.options.special_text == "plain" else text

    def _ids(self, text: str) -> Ids:
        return self._texts.ids(self._marked(text))

    def _with_prefix(self, ids: Ids) -> Ids:
        there = not len(self._prefix) or np.array_equal(ids[: len(self._prefix)], self._prefix)
        return ids if there else np.concatenate([self._prefix, ids])

    def _with_eos(self, ids: Ids) -> Ids:
        return ids if len(ids) and ids[-1] == self._eos[0] else np.concatenate([ids, self._eos])

    def _count_special(self, *texts: str) -> None:
        if any(self._texts.controls(text) for text in texts):
            self.counts["special_token_text"] += 1


def _origin(row: Mapping[str, Any]) -> str:
    return str(row.get("origin") or row.get("id") or "?")


def _texts_of(row: Mapping[str, Any]) -> Iterator[str]:
    """All texts of a stored conversation."""
    for message in row["messages"]:
        yield from (text for key, text in message.items() if key != "role" and text)
    yield row.get("tools") or ""
