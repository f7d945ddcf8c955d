"""Rows of JSON lines and of JSON arrays."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
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
FEW_KEYS = 50
"""Of more keys than this, each is not looked for in a row's text: reading the text again is faster then."""
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
        yield from _Array(head, f, label).rows()
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
        self._known, self._line, self._column = 0, 1, 0  # a place in `text` at or before `_at`, and where in the file

    def rows(self) -> Parsed:
        """The rows, each by the line that it begins in: `#2` is the second of one line. Raises DataError with line and
        column where the array breaks off."""
        line = of_line = 0
        try:
            more = self._next() != "]"
            while more:
                self._keep_place()
                line, of_line = self._line, of_line + 1 if self._line == line else 1
                yield f"{self._label}:{line}" + (f"#{of_line}" if of_line > 1 else ""), self._item()
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
        return not_utf8(text) or (_checked(value, text, value) if decoder is _DECODER else _object(text))

    def _read_on(self) -> bool:
        """Read at least as much as is held of the item, and forget what lies before it; False at the file's end."""
        more = self._file.read(max(CHUNK, len(self._text) - self._at))
        if more:
            self._keep_place()
            self._text, self._at, self._known = self._text[self._at :] + more, 0, 0
        return bool(more)

    def _keep_place(self) -> None:
        """Note where in the file the reading is, so that no line is counted twice."""
        line, column = self._place(self._at)
        self._known, self._line, self._column = self._at, line, column - 1

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column, from 1, of a place in `text` from the known one on."""
        newline = self._text.rfind("\n", self._known, at)
        column = at - newline if newline >= 0 else self._column + at - self._known + 1
        return self._line + self._text.count("\n", self._known, at), column


def _object(text: str) -> Row | BadRow:
    """The object of one line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return BadRow(_not_json(error, error.pos + 1), text)
    except RecursionError:
        return BadRow(_TOO_DEEP, text)
    except ValueError as error:  # an integer of more digits than Python reads
        return BadRow(f"cannot be read ({short(error).partition(';')[0]}): write it as text", text)
    return _checked(value, text, text)


def _checked(value: Any, text: str, content: Any) -> Row | BadRow:
    """The value of a JSON `text` if it is a row; `content`: what else is set aside."""
    if not isinstance(value, dict):
        return BadRow(f"a row must be a JSON object, found {type(value).__name__}", content)
    if key := _key_twice(value, text):
        return BadRow(f"the key {key!r} is there twice: rename one, or leave one out", text)
    return value


def _key_twice(row: Row, text: str) -> str | None:
    """A key that an object has twice, of which only the last would count; its text is read again only if it may."""
    if len(row) <= FEW_KEYS and all(text.count(f'"{key}"') == 1 for key in row):
        return None
    keys: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:  # of each object, and so of the row itself last
        keys[:] = [key for key, _ in pairs]

    json.JSONDecoder(object_pairs_hook=note, parse_int=str).decode(text)
    return next((key for key, count in Counter(keys).items() if count > 1), None)


def _not_json(error: json.JSONDecodeError, column: int) -> str:
    return f"not valid JSON ({error.msg.removesuffix(' at')} at column {column})"
