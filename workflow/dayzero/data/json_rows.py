"""Rows of JSON lines and of JSON arrays."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from dayzero.data.bad_rows import BadRow, Parsed, not_utf8
from dayzero.data.rows import Row
from dayzero.errors import DataError, short

_TOO_DEEP = "not valid JSON (nested too deeply)"
_DECODER = json.JSONDecoder()
_ANY_DIGITS = json.JSONDecoder(parse_int=str)
CHUNK = 2**18
"""Characters of an array that are read at a time, or as many as its longest object has."""
LONGEST_TOKEN = 16
"""Characters of anything but a text or a number that stand in one piece, like -Infinity or an escaped pair."""
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
    head = more = f.read(CHUNK)
    while more and not head.strip():
        more = f.read(CHUNK)
        head += more
    if head.lstrip().startswith("["):
        for index, row in enumerate(_Array(head, f, label).rows(), 1):
            yield f"{label}:{index}", row
        return
    head += f.readline()
    if head.lstrip().partition("\n")[0].strip() == "{":
        raise DataError(f"{label}: one JSON object: write a list of objects, or one object a line")
    yield from jsonl(itertools.chain(io.StringIO(head, newline=""), f), label)


class _Array:
    """A JSON array that is read as its rows are asked for; only what has not been read of it yet is in memory.

    Args:
        text: the beginning of the file, with the array's bracket.
        file: what follows.
    """

    def __init__(self, text: str, file: TextIO, label: str) -> None:
        self._text, self._file, self._label = text, file, label
        self._at = text.index("[") + 1
        self._line, self._column = 1, 0  # where `text` begins

    def rows(self) -> Iterator[Row | BadRow]:
        """The rows. Raises DataError with line and column where the array breaks off."""
        try:
            more = self._next() != "]"
            while more:
                yield self._item()
                if more := self._next() == ",":
                    self._at += 1
                    self._next()
            if self._next() != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", self._text, self._at)
            self._at += 1
            if self._next():
                raise json.JSONDecodeError("Extra data", self._text, self._at)
        except json.JSONDecodeError as error:
            line, column = self._place(error.pos)
            raise DataError(f"{self._label}:{line}: {_not_json(error, column)}") from error
        except RecursionError as error:
            raise DataError(f"{self._label}: {_TOO_DEEP}") from error

    def _next(self) -> str:
        """Pass over white space; the character that follows, none at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._read_on():
                return self._text[self._at : self._at + 1]

    def _item(self) -> Row | BadRow:
        decoder = _DECODER
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # Only a text can be cut off long before the end of what has been read.
                cut_off = error.pos > len(self._text) - LONGEST_TOKEN or error.msg.startswith("Unterminated string")
                if not cut_off or not self._read_on():
                    raise
                continue
            except ValueError:  # an integer of too many digits
                decoder = _ANY_DIGITS
                continue
            if end < len(self._text) or not self._read_on():  # else a number may go on
                break
        text, self._at = self._text[self._at : end], end
        return not_utf8(text) or (_checked(value, value) if decoder is _DECODER else _object(text))

    def _read_on(self) -> bool:
        """Read at least as much as is held of the item, and forget what lies before it; False at the file's end."""
        more = self._file.read(max(CHUNK, len(self._text) - self._at))
        if more:
            line, column = self._place(self._at)
            self._line, self._column = line, column - 1
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column, from 1, of a place in `text`."""
        newline = self._text.rfind("\n", 0, at)
        column = at - newline if newline >= 0 else self._column + at + 1
        return self._line + self._text.count("\n", 0, at), column


def _object(text: str) -> Row | BadRow:
    """The object of one line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return BadRow(_not_json(error, error.colno), text)
    except RecursionError:
        return BadRow(_TOO_DEEP, text)
    except ValueError as error:  # an integer of more digits than Python reads
        return BadRow(f"cannot be read ({short(error).partition(';')[0]}): write it as text", text)
    return _checked(value, text)


def _checked(value: Any, content: Any) -> Row | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow(f"a row must be a JSON object, found {type(value).__name__}", content)


def _not_json(error: json.JSONDecodeError, column: int) -> str:
    return f"not valid JSON ({error.msg.removesuffix(' at')} at column {column})"
