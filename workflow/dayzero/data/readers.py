"""Rows out of files: JSON lines, JSON, CSV, text (also compressed), Parquet, Arrow and Megatron, read as a stream.

Files are parsed and never executed: nothing here imports, unpickles or evaluates what a file holds.
"""

from __future__ import annotations

import bz2
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from dayzero.data.bad_rows import BadRow, Parsed, not_utf8
from dayzero.data.columnar_rows import arrow_rows, megatron_rows, parquet_rows
from dayzero.data.csv_rows import csv_rows, tsv_rows
from dayzero.data.file_kinds import COMPRESSIONS, endings, file_kind
from dayzero.data.json_rows import json_array_or_lines, jsonl
from dayzero.data.rows import Row
from dayzero.errors import DataError, short

Reject = Callable[[str, str, Any], None]
"""Takes a row that cannot be read: (origin, reason, the row or its text)."""


def read_rows(path: Path, label: str, reject: Reject | None = None) -> Iterator[tuple[str, Row]]:
    """Yield (origin, row) of one file; origin is "name:line", where the row begins (for Parquet, Arrow and
    Megatron the n-th row), "name:line#2" for the second row of a JSON array's line.

    A text file gives a row `{"text": line}` for each line, as `datasets` does. Raises DataError naming the file, the
    line and the remedy for anything that cannot be read; a single bad line is given to `reject` instead, if there is
    one.
    """
    kind = file_kind(path)
    if kind is None:
        raise DataError(
            f"{label}: unknown kind of data file {path.suffix!r}: convert it, or give it the ending it should have; "
            f"known are {endings()}"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{label}: the file is empty: fetch it again, or leave it out")
    for origin, row in _parsed(path, label, kind):
        if not isinstance(row, BadRow):
            yield origin, row
        elif reject is None:
            raise DataError(f"{origin}: {row.reason}")
        else:
            reject(origin, row.reason, row.content)


def _parsed(path: Path, label: str, kind: str) -> Parsed:
    try:
        if kind in _BINARY_READERS:
            yield from _BINARY_READERS[kind](path, label)
        else:
            with _open_bytes(path) as f:
                if kind == "jsonl":
                    yield from jsonl(f, label)
                else:
                    # a byte that is no UTF-8 becomes half a surrogate pair, so that the row it stands in can be told
                    text = io.TextIOWrapper(f, encoding="utf-8-sig", errors="surrogateescape", newline="")
                    yield from _TEXT_READERS[kind](text, label)
    except pa.ArrowException as error:
        raise DataError(f"{label}: cannot be read as {kind}: {short(error)}: fetch or write it again") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"{label}: the compressed file is damaged or cut off ({short(error)}): fetch it again"
        ) from error


def _open_bytes(path: Path) -> io.BufferedReader:
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return open(path, "rb")
    if compression in ("bz2", "xz"):
        return io.BufferedReader((bz2.open if compression == "bz2" else lzma.open)(path), 1 << 20)
    # Arrow notices a cut-off stream, which Python's own zstandard reader does not
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), 1 << 20)


def _text(f: TextIO, label: str) -> Parsed:
    for number, line in enumerate(f, 1):
        if line.strip():
            yield f"{label}:{number}", not_utf8(line) or {"text": line.rstrip("\r\n")}


_BINARY_READERS: dict[str, Callable[[Path, str], Parsed]] = {
    "parquet": parquet_rows,
    "arrow": arrow_rows,
    "megatron": megatron_rows,
}
_TEXT_READERS: dict[str, Callable[[TextIO, str], Parsed]] = {
    "json": json_array_or_lines,
    "csv": csv_rows,
    "tsv": tsv_rows,
    "text": _text,
}
