"""Rows of comma- and tab-separated files, each named by its first line."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from typing import TextIO

from dayzero.data.bad_rows import BadRow, Parsed, not_utf8
from dayzero.data.rows import check_names
from dayzero.errors import DataError


class _CsvLines:
    """The lines of a file for the csv module, with those of the row that it is at: a row can have several."""

    def __init__(self, f: TextIO) -> None:
        self._file = f
        self._number = 0
        self._row: list[str] = []
        self.ended = False

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = next(self._file, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self._number += 1
        self._row.append(line)
        return line

    def next_row(self) -> None:
        """What is read from now on is another row's."""
        self._row.clear()

    @property
    def first(self) -> int:
        """Number of the row's first line."""
        return self._number - len(self._row) + 1

    @property
    def text(self) -> str:
        """All of the row."""
        return "".join(self._row)


def csv_rows(f: TextIO, label: str, delimiter: str = ",") -> Parsed:
    """Rows under the names of the header.

    Raises DataError for a header that cannot be read or has a name twice, and for an open quote.
    """
    csv.field_size_limit(sys.maxsize)
    header: list[str] | None = None
    for number, row in _fields(_CsvLines(f), label, delimiter):
        origin = f"{label}:{number}"
        if header is None:
            if isinstance(row, BadRow):
                raise DataError(f"{origin}: the header cannot be read: {row.reason}")
            header = row
            check_names(header, origin)
        elif isinstance(row, BadRow):
            yield origin, row
        elif len(row) != len(header):
            extra = "more" if len(row) > len(header) else "fewer"
            yield origin, BadRow(f"{extra} fields than the header's {len(header)}: check quotes", row)
        else:
            yield origin, dict(zip(header, row, strict=True))


def _fields(lines: _CsvLines, label: str, delimiter: str) -> Iterator[tuple[int, list[str] | BadRow]]:
    """The number of each row's first line, and its fields; blank lines are passed over."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        lines.next_row()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.ended:  # a quote without an end takes all that follows for its text
                raise DataError(
                    f"{label}:{lines.first}: not valid CSV: a quote of the row that begins here is not closed: "
                    f"close it, or write quotes inside a field twice ({error})"
                ) from error
            yield lines.first, BadRow(f"not valid CSV: {error}", lines.text)  # the reader begins anew at the next line
            continue
        if row:
            yield lines.first, not_utf8(lines.text) or row


def tsv_rows(f: TextIO, label: str) -> Parsed:
    """The same, separated by tabs."""
    return csv_rows(f, label, "\t")
