"""What a row means: from any columns to `text`, `prompt` + `completion`, `messages`, or token ids.

docs/data.md describes each format; every one has an example in docs/examples/data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from dayzero.column_template import fill, parse_template
from dayzero.console import log
from dayzero.data import conversations, question_formats
from dayzero.data.rows import Dropped, Example, Reader, from_json, null_value, scalar_text
from dayzero.errors import ConfigError, DataError
from dayzero.format_columns import COLUMNS, Columns

SCHEMAS = {
    "text": pa.schema([("text", pa.string())]),
    "prompt_completion": pa.schema([("prompt", pa.string()), ("completion", pa.string())]),
    "messages": conversations.SCHEMA,
    "pretokenized": pa.schema([("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_()))]),
}
"""The four kinds of rows that are stored; every format becomes one of them."""

MAX_TOKEN_ID = 2**31 - 1
IGNORE = -100


def _text(reader: Reader) -> Example | Dropped:
    text = reader.text("text", answer=True)
    return Example({"text": text}, text, len(text), reader.id()) if text.strip() else Dropped("empty")


def _prompt_completion(reader: Reader) -> Example | Dropped:
    return question_formats.prompt_and_completion(
        reader.text("prompt"), reader.text("completion", answer=True), reader.id()
    )


def _pretokenized(reader: Reader) -> Example | Dropped:
    """Token ids with a loss mask: from `loss_mask`, or `labels` (equal to the ids, or -100), else all supervised.

    Where `attention_mask` is 0 there is padding, which is left out.
    """
    ids = _integers(reader, "input_ids", 0, MAX_TOKEN_ID)
    if not ids:
        return Dropped("empty")
    mask = [True] * len(ids)
    if reader.has("loss_mask"):
        mask = [bool(flag) for flag in _flags(reader, "loss_mask", len(ids))]
    if reader.has("labels"):
        labels = _integers(reader, "labels", IGNORE, MAX_TOKEN_ID, len(ids))
        wanted = [label != IGNORE for label in labels]
        if reader.has("loss_mask") and wanted != mask:
            raise DataError(
                f"{reader.origin}: columns {reader.name('loss_mask')!r} and {reader.name('labels')!r} supervise other "
                "tokens: leave one of them out"
            )
        mask = wanted
        at = next((i for i, label in enumerate(labels) if label not in (IGNORE, ids[i])), None)
        if at is not None:
            raise DataError(
                f"{reader.origin}: label {at + 1} is {labels[at]}, neither -100 nor the token in its place, {ids[at]}: "
                "labels are not shifted here"
            )
    if reader.has("attention_mask"):
        kept = [at for at, flag in enumerate(_flags(reader, "attention_mask", len(ids))) if flag]
        ids, mask = [ids[at] for at in kept], [mask[at] for at in kept]
        if not ids:
            return Dropped("empty")
    return Example({"input_ids": ids, "loss_mask": mask}, " ".join(map(str, ids)), len(ids), reader.id())


def _flags(reader: Reader, column: str, length: int) -> list[int]:
    """One for each token: 0 and 1, or false and true."""
    return _integers(reader, column, 0, 1, length, flags=True)


def _integers(
    reader: Reader, column: str, low: int, high: int, length: int | None = None, flags: bool = False
) -> list[int]:
    what = f"column {reader.name(column)!r}"
    value = from_json(reader.value(column), reader.origin, what)
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list):
        raise reader.fail(column, "a list of integers")
    where = f"{reader.origin}: {what}"
    if length is not None and len(value) != length:
        raise DataError(f"{where} has {len(value)} entries for {length} tokens")
    for item in value:
        if not isinstance(item, int) or (isinstance(item, bool) and not flags) or not low <= item <= high:
            raise DataError(f"{where} holds {item!r}, expected integers from {low} to {high}")
    return value


@dataclass(frozen=True)
class Format:
    """How rows of one format are told and read."""

    stored: str
    """The kind of row it becomes, a key of SCHEMAS."""
    read: Callable[[Reader], Example | Dropped]
    columns: Columns
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other names that a column goes by."""

    def reader(self, row: Mapping[str, Any], origin: str, columns: dict[str, str]) -> Reader:
        return Reader(row, origin, columns, self.aliases)


_READERS: dict[str, tuple[str, Callable[[Reader], Example | Dropped]]] = {
    "messages": ("messages", conversations.messages),
    "sharegpt": ("messages", conversations.sharegpt),
    "pretokenized": ("pretokenized", _pretokenized),
    "alpaca": ("messages", conversations.alpaca),
    "squad": ("prompt_completion", question_formats.squad),
    "multiple_choice": ("prompt_completion", question_formats.multiple_choice),
    "prompt_completion": ("prompt_completion", _prompt_completion),
    "text": ("text", _text),
}
_ALIASES = {
    "multiple_choice": {"question": ("ctx",), "choices": ("endings",), "answer": ("answerKey", "label", "gold")},
}
FORMATS = {name: Format(*_READERS[name], columns, _ALIASES.get(name, {})) for name, columns in COLUMNS.items()}
"""By name, in the order in which a row's format is looked for."""


def stored_kind(format_name: str, template: dict[str, str] | None = None) -> str:
    """The kind of row, a key of SCHEMAS, that a format becomes."""
    if template is not None:
        keys = template.keys()
        return "text" if "text" in keys else "prompt_completion" if "prompt" in keys else "messages"
    return "messages" if format_name == "function_calling" else FORMATS[format_name].stored


def detect_format(row: Mapping[str, Any], columns: dict[str, str], origin: str) -> str:
    """The format whose columns the row has, after renaming by `columns`; raises ConfigError when none fits."""
    for name, form in FORMATS.items():
        reader = form.reader(row, origin, columns)
        if all(map(reader.has, form.columns.needs)):
            log.info(
                "format: %s (from the columns %s of %s)", name, ", ".join(map(reader.name, form.columns.needs)), origin
            )
            return name
    options = "; ".join(" + ".join(form.columns.needs) for form in reversed(FORMATS.values()))
    raise ConfigError(
        f"data.format auto: {origin} has the columns {', '.join(map(str, row))}, none of the formats fits ({options}): "
        "name yours in data.columns, e.g. {prompt: question, completion: answer}, or say in data.template what they "
        "make, e.g. {user: '{question}', assistant: '{answer}'}"
    )


def normalise(
    row: Mapping[str, Any],
    origin: str,
    format_name: str,
    columns: dict[str, str],
    template: dict[str, str] | None = None,
) -> Example | Dropped:
    """One row in its format. Raises DataError naming the row when a column is missing or holds the wrong thing.

    `template`: what format template makes of the columns, see `data.template`.
    """
    if format_name == "template":
        assert template is not None
        return _from_template(Reader(row, origin, columns), template)
    form = FORMATS[format_name]
    return form.read(form.reader(row, origin, columns))


def _from_template(reader: Reader, template: dict[str, str]) -> Example | Dropped:
    def value(name: str) -> str:
        return scalar_text(reader.value(name), reader.origin, f"column {reader.name(name)!r}")

    parts = {key: parse_template(text, f"data.template.{key}") for key, text in template.items()}
    texts = {key: fill(of_key, value) for key, of_key in parts.items()}
    if not next(texts[key] for key in ("text", "completion", "assistant") if key in texts).strip():
        return Dropped("empty")
    for key in ("prompt", "user"):
        names = [name for _, name in parts.get(key, ()) if name is not None]
        if names and all(reader.value(name) is None for name in names):
            nulls = ", ".join(map(repr, map(reader.name, dict.fromkeys(names))))
            raise null_value(reader.origin, f"data.template.{key}: {'each of ' if ',' in nulls else ''}{nulls}")
    if "text" in texts:
        return Example(texts, texts["text"], len(texts["text"]), reader.id())
    if "prompt" in texts:
        return question_formats.prompt_and_completion(texts["prompt"], texts["completion"], reader.id())
    done = [{"role": role, "content": texts[role]} for role in ("system", "user", "assistant") if role in texts]
    return conversations.conversation(done, None, reader.id())
