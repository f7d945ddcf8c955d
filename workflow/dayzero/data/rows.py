"""What all formats share: the example a row becomes, and reading a row's values with errors that name the row."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dayzero.errors import DataError

Row = dict[str, Any]


class PaddedRow(Row):
    """A row out of Arrow (Parquet, Arrow files, the hub), where the objects of all rows have one shape: a key that a
    row's own object lacked is there with the value null."""


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


class Reader:
    """Reads one row by the format's own column names, which `columns` may call something else in the file.

    `aliases` are names that the format also goes by where `columns` says nothing.
    """

    def __init__(
        self, row: Mapping[str, Any], origin: str, columns: dict[str, str], aliases: Mapping[str, tuple[str, ...]] = {}
    ) -> None:
        self.row, self.origin, self._columns, self._aliases = row, origin, columns, aliases

    def name(self, column: str) -> str:
        """What the column is called in the file."""
        if column in self._columns:
            return self._columns[column]
        return next((a for a in self._aliases.get(column, ()) if a in self.row and column not in self.row), column)

    def has(self, column: str) -> bool:
        """Whether the row has the column."""
        return self.name(column) in self.row

    def value(self, column: str) -> Any:
        """The column's value; DataError where there is none."""
        return column_value(self.row, self.name(column), self.origin)

    def text(self, column: str, *, optional: bool = False, answer: bool = False) -> str:
        """The column's text. A null is empty where the column is `optional`, which may then also not be there, or the
        `answer`: a row without one is left out. Elsewhere it is an error: to ask nothing would be learnt."""
        if optional and not self.has(column):
            return ""
        read = as_text if optional or answer else needed_text
        return read(self.value(column), self.origin, f"column {self.name(column)!r}")

    def id(self) -> str | None:
        """The row's own id, where it has one that is a text or an integer."""
        value = self.row.get(self._columns.get("id", "id"))
        return str(value) if isinstance(value, str | int) else None

    def fail(self, column: str, expected: str) -> DataError:
        """The error for a column that holds something else than expected."""
        return DataError(
            f"{self.origin}: column {self.name(column)!r} holds {kind(self.value(column))}, expected {expected}"
        )


def check_names(names: Sequence[str], where: str) -> None:
    """Raise DataError where two columns have one name, of which a row would keep the last; blank ones may repeat."""
    if twice := [name for name, count in Counter(names).items() if count > 1 and name.strip()]:
        raise DataError(
            f"{where}: several columns are called {', '.join(twice)}: rename them, or leave all but one out"
        )


def column_value(row: Mapping[str, Any], name: str, origin: str) -> Any:
    """The row's value, None for the NaN by which tables say that a number is missing.

    Raises DataError with the columns there are when the row has no such column.
    """
    if name in row:
        value = row[name]
        return None if isinstance(value, float) and value != value else value
    close = difflib.get_close_matches(name, map(str, row), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise DataError(
        f"{origin}: no column {name!r}{hint}; it has {', '.join(map(str, row))}: set data.columns, or, where other "
        "rows have it, set such ones aside (data.on_bad_row: reject)"
    )


def as_text(value: Any, where: str, what: str) -> str:
    """A text as it is, null as the empty one; DataError for anything else and for what UTF-8 cannot write."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} holds {kind(value)}, expected text")
    check_unicode(value, where, what)
    return value


def needed_text(value: Any, where: str, what: str) -> str:
    """As `as_text`, but DataError for null."""
    if value is None:
        raise null_value(where, what)
    return as_text(value, where, what)


def null_value(where: str, what: str) -> DataError:
    """The error for a null where a text is needed."""
    return DataError(
        f"{where}: {what} holds nothing (null), expected text: fill it, take the row out, or set such rows aside "
        "(data.on_bad_row: reject)"
    )


def scalar_text(value: Any, where: str, what: str) -> str:
    """As `as_text`, but numbers and true/false too, as JSON writes them."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else as_text(value, where, what)


def check_unicode(value: str, where: str, what: str) -> None:
    """Raise DataError where a text holds half a surrogate pair, as a JSON escape (`\\ud83d`) can say."""
    if value.isascii():
        return
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {what} holds {value[error.start]!a} at character {error.start + 1}, half of a surrogate pair: "
            "write the whole character"
        ) from error


def from_json(value: Any, where: str, what: str) -> Any:
    """The value of JSON text, as files without nested columns hold it; anything but text as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{where}: no JSON in {what}, though the text begins so ({error})") from error
    except RecursionError as error:
        raise DataError(f"{where}: {what} is JSON that is nested too deeply") from error


def to_json(value: Any, where: str, what: str) -> str:
    """Compact JSON text that keeps the order of keys; DataError for a value that JSON does not have."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {what} cannot be written as JSON ({error})") from error
    except RecursionError as error:
        raise DataError(f"{where}: {what} is nested too deeply to be written as JSON") from error
    check_unicode(text, where, what)
    return text


def kind(value: Any) -> str:
    """What a value is, in words."""
    names: dict[type, str] = {str: "text", list: "a list", bool: "true/false", type(None): "nothing"}
    if isinstance(value, dict):
        return "an object"
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
