"""What a row means: from any columns to `text`, `prompt` + `completion`, or `messages`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dayzero.console import log
from dayzero.errors import ConfigError, DataError

COLUMNS = {"text": ["text"], "prompt_completion": ["prompt", "completion"], "messages": ["messages"]}
"""The columns of each format, most telling format last."""

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMAS = {
    "text": pa.schema([("text", pa.string())]),
    "prompt_completion": pa.schema([("prompt", pa.string()), ("completion", pa.string())]),
    "messages": pa.schema([("messages", pa.list_(_MESSAGE))]),
}
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """A normalised row. `question` decides which rows must share a split; `num_chars` is the whole row's length."""

    columns: dict[str, Any]
    question: str
    num_chars: int
    id: str | None = None


@dataclass(frozen=True)
class Dropped:
    """A row that is left out, and why (a key of the manifest's `dropped`)."""

    reason: str


def detect_format(row: dict[str, Any], columns: dict[str, str], origin: str) -> str:
    """The format whose columns the row has, after renaming by `columns`; raises ConfigError when none fits."""
    for name, needed in reversed(COLUMNS.items()):
        if all(columns.get(c, c) in row for c in needed):
            log.info("format: %s (from the columns %s)", name, ", ".join(columns.get(c, c) for c in needed))
            return name
    options = "; ".join(" + ".join(needed) for needed in COLUMNS.values())
    raise ConfigError(
        f"data.format auto: {origin} has the columns {', '.join(map(str, row))}, none of the formats fits ({options}): "
        "name yours in data.columns, e.g. {prompt: question, completion: answer}"
    )


def check_columns(format_name: str, columns: dict[str, str]) -> None:
    """Raise ConfigError when `columns` renames something that the format does not read."""
    known = [*COLUMNS[format_name], "id"]
    for name in columns:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(
                f"data.columns: {name!r} is not a column of {format_name}{hint}: it has {', '.join(known)}"
            )


def normalise(row: dict[str, Any], origin: str, format_name: str, columns: dict[str, str]) -> Example | Dropped:
    """One row in its format. Raises DataError naming the row when a column is missing or holds the wrong thing."""
    values = {c: column(row, columns.get(c, c), origin) for c in COLUMNS[format_name]}
    row_id = row.get(columns["id"]) if "id" in columns else row.get("id")
    name = str(row_id) if isinstance(row_id, str | int) else None
    if format_name == "messages":
        return _conversation(values["messages"], origin, columns.get("messages", "messages"), name)
    texts = {c: _text(value, origin, columns.get(c, c)) for c, value in values.items()}
    question, answer = next(iter(texts.values())), list(texts.values())[-1]
    if not answer.strip():
        return Dropped("empty")
    return Example(texts, question, sum(map(len, texts.values())), name)


def column(row: dict[str, Any], name: str, origin: str) -> Any:
    """The row's value; raises DataError with the columns there are when it has no such column."""
    if name in row:
        return row[name]
    close = difflib.get_close_matches(name, map(str, row), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise DataError(f"{origin}: no column {name!r}{hint}; it has {', '.join(map(str, row))}: set data.columns")


def _text(value: Any, origin: str, name: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{origin}: column {name!r} holds {_kind(value)}, expected text")
    return value


def _conversation(value: Any, origin: str, name: str, row_id: str | None) -> Example | Dropped:
    if not isinstance(value, list):
        raise DataError(f"{origin}: column {name!r} holds {_kind(value)}, expected a list of {{role, content}}")
    messages = []
    for number, message in enumerate(value, 1):
        where = f"{origin}: message {number} of {name!r}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            found = ", ".join(message) if isinstance(message, dict) else _kind(message)
            raise DataError(f"{where} has {found}, expected role and content")
        if message["role"] not in ROLES:
            raise DataError(f"{where} has the role {message['role']!r}, expected one of {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise DataError(f"{where} has tool_calls, which are not read: write the call into content")
        messages.append({"role": message["role"], "content": _text(message["content"], where, "content")})
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        return Dropped("no_assistant_turn")
    question = "\n".join(m["content"] for m in messages if m["role"] == "user")
    # a conversation that the assistant opens has no question: the whole of it stands for one
    question = question if question.strip() else "\n".join(m["content"] for m in messages)
    return Example({"messages": messages}, question, sum(len(m["content"]) for m in messages), row_id)


def _kind(value: Any) -> str:
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object", bool: "true/false", type(None): "nothing"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
