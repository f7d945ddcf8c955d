"""Rows of JSON lines and of JSON arrays."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from dayzero.data.bad_rows import BadRow, Parsed, not_utf8
from dayzero.data.rows import Row
from dayzero.errors import DataError, short

_TOO_DEEP = "not valid JSON (nested too deeply)"
_ANY_DIGITS = json.JSONDecoder(parse_int=str)
_SPACE = re.compile(r"[ \t\r\n]*")


def jsonl(lines: Iterable[bytes | str], label: str, first: int = 1) -> Parsed:
    """An object a line; blank lines are passed over. `first`: the number of the first line."""
    for number, line in enumerate(lines, first):
        text = line
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
        if text.strip():
            yield f"{label}:{number}", not_utf8(text) or _object(text)


def json_array_or_lines(f: TextIO, label: str) -> Parsed:
    """A JSON array of objects, or JSON lines under the name .json."""
    blank, first = 0, ""
    for line in f:
        if line.strip():
            first = line
            break
        blank += 1
    if first.lstrip().startswith("["):
        # the blank lines are put back so that an error names the right one
        rows = _array("\n" * blank + first + f.read(), label)
        for index, row in enumerate(rows, 1):
            yield f"{label}:{index}", row
    elif first.strip() == "{":
        raise DataError(f"{label}: one JSON object: write a list of objects, or one object a line")
    else:
        yield from jsonl(itertools.chain([first], f), label, blank + 1)


def _array(text: str, label: str) -> Iterable[Row | BadRow]:
    """The rows of a JSON array; read one by one only where one of them cannot be read as it stands."""
    try:
        if not not_utf8(text):
            return [_checked(row, row) for row in json.loads(text)]
    except json.JSONDecodeError as error:
        raise DataError(f"{label}:{error.lineno}: {_not_json(error)}") from error
    except RecursionError as error:
        raise DataError(f"{label}: {_TOO_DEEP}") from error
    except ValueError:
        pass  # an integer of too many digits
    return _items(text, label)


def _items(text: str, label: str) -> Iterator[Row | BadRow]:
    at = _SPACE.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    more = not text.startswith("]", at)
    try:
        while more:
            _, end = _ANY_DIGITS.raw_decode(text, at)
            yield not_utf8(text[at:end]) or _object(text[at:end])
            at = _SPACE.match(text, end).end()  # type: ignore[union-attr]
            if more := text.startswith(",", at):
                at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
        if not text.startswith("]", at):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if rest := text[at + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, text.index(rest, at + 1))
    except json.JSONDecodeError as error:
        raise DataError(f"{label}:{error.lineno}: {_not_json(error)}") from error
    except RecursionError as error:
        raise DataError(f"{label}: {_TOO_DEEP}") from error


def _object(text: str) -> Row | BadRow:
    """The object of one line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return BadRow(_not_json(error), text)
    except RecursionError:
        return BadRow(_TOO_DEEP, text)
    except ValueError as error:  # an integer of more digits than Python reads
        return BadRow(f"cannot be read ({short(error).partition(';')[0]}): write it as text", text)
    return _checked(value, text)


def _checked(value: Any, content: Any) -> Row | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow(f"a row must be a JSON object, found {type(value).__name__}", content)


def _not_json(error: json.JSONDecodeError) -> str:
    return f"not valid JSON ({error.msg} at column {error.colno})"
