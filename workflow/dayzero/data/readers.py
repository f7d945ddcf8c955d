"""Rows out of files: JSON lines, JSON, CSV, Parquet and text, plain or compressed (.gz, .zst), read as a stream."""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from dayzero.errors import DataError

Row = dict[str, Any]
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def data_files(path: Path, label: str) -> list[tuple[Path, str]]:
    """The data files of a file or directory (recursively, sorted) with their names; raises DataError if none."""
    if path.is_file():
        return [(path, label)]
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".") and _kind(p)]
    if not files:
        raise DataError(f"{label}: no data file in the directory; known endings are {_endings()}")
    return [(p, f"{label}/{p.relative_to(path)}" if "*" not in label else str(p.relative_to(path))) for p in files]


def read_rows(path: Path, label: str) -> Iterator[tuple[str, Row]]:
    """Yield (origin, row) of one file; origin is "name:line" (for JSON arrays and Parquet the n-th row).

    A text file gives a row `{"text": line}` for each line, as `datasets` does. Raises DataError naming the file, the
    line and the remedy for anything that cannot be read.
    """
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{label}: unknown kind of data file {path.suffix!r}; known endings are {_endings()}")
    if path.stat().st_size == 0:
        raise DataError(f"{label}: the file is empty")
    try:
        if kind == "parquet":
            yield from _parquet(path, label)
        else:
            with _open_text(path) as f:
                yield from _TEXT_READERS[kind](f, label)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{label}: not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8"
        ) from error
    except pa.ArrowException as error:
        raise DataError(f"{label}: cannot be read as {kind}: {_short(error)}: fetch or write it again") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise DataError(
            f"{label}: the compressed file is damaged or cut off ({_short(error)}): fetch it again"
        ) from error


def _kind(path: Path) -> str | None:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def _open_text(path: Path) -> TextIO:
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return open(path, encoding="utf-8-sig", newline="")
    # Arrow notices a cut-off stream, which Python's own zstandard reader does not
    return io.TextIOWrapper(pa.input_stream(str(path), compression=compression), encoding="utf-8-sig", newline="")


def _jsonl(f: Iterable[str], label: str, first: int = 1) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(f, first):
        if line.strip():
            yield _object(_parse(line, f"{label}:{number}"), f"{label}:{number}")


def _json(f: TextIO, label: str) -> Iterator[tuple[str, Row]]:
    """A JSON array of objects, or JSON lines under the name .json."""
    blank, first = 0, ""
    for line in f:
        if line.strip():
            first = line
            break
        blank += 1
    if first.lstrip().startswith("["):
        # the blank lines are put back so that an error names the right one
        rows = _parse("\n" * blank + first + f.read(), label, multiline=True)
        for index, row in enumerate(rows, 1):
            yield _object(row, f"{label}:{index}")
    elif first.strip() == "{":
        raise DataError(f"{label}: one JSON object; expected a list of objects, or one object a line")
    else:
        yield from _jsonl(itertools.chain([first], f), label, blank + 1)


def _csv(f: TextIO, label: str, delimiter: str = ",") -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(f, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            origin = f"{label}:{reader.line_num}"
            if None in row or None in row.values():
                extra = "more" if None in row else "fewer"
                raise DataError(
                    f"{origin}: {extra} fields than the header's {len(reader.fieldnames or [])}: check quotes"
                )
            yield origin, row
    except csv.Error as error:
        raise DataError(f"{label}:{reader.line_num}: not valid CSV: {error}") from error


def _tsv(f: TextIO, label: str) -> Iterator[tuple[str, Row]]:
    return _csv(f, label, "\t")


def _text(f: TextIO, label: str) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(f, 1):
        if line.strip():
            yield f"{label}:{number}", {"text": line.rstrip("\r\n")}


_TEXT_READERS: dict[str, Callable[[TextIO, str], Iterator[tuple[str, Row]]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _tsv,
    "text": _text,
}


def _parquet(path: Path, label: str) -> Iterator[tuple[str, Row]]:
    with pq.ParquetFile(path) as file:
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield f"{label}:{number}", row


def _parse(text: str, where: str, multiline: bool = False) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{where}:{error.lineno}" if multiline else where
        raise DataError(f"{place}: not valid JSON ({error.msg} at column {error.colno})") from error


def _object(value: Any, origin: str) -> tuple[str, Row]:
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a row must be a JSON object, found {type(value).__name__}")
    return origin, value


def _endings() -> str:
    return ", ".join(KINDS) + ", also with .gz or .zst (Parquet compresses itself)"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
