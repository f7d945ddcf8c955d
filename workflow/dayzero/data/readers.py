"""Rows out of files: JSON lines, JSON, CSV, text (also .gz and .zst), Parquet, Arrow and Megatron, read as a stream.

Files are parsed and never executed: nothing here imports, unpickles or evaluates what a file holds.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from dayzero.data import megatron
from dayzero.data.rows import PaddedRow, Row
from dayzero.data.stored_table import table_bytes
from dayzero.errors import DataError

Reject = Callable[[str, str, Any], None]
"""Takes a row that cannot be read: (origin, reason, the row or its text)."""

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".idx": "megatron",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NOT_ROWS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside the rows of a data set that it saves."""
BATCH_ROWS, BATCH_BYTES = 1000, 32 * 2**20
"""Rows of a columnar file that are in memory at once, and bytes (rows can be large)."""


def data_files(path: Path, label: str) -> list[tuple[Path, str]]:
    """The data files of a file or directory (recursively, sorted) with their names; raises DataError if none."""
    if path.is_file():
        return [(path, label)]
    if megatron.partner(Path(label)):  # a directory that holds no more than the pair
        return [(p, label) for p in path.iterdir() if p.suffix == ".idx"]
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith(".") and _kind(p)]
    files = [p for p in files if p.name not in NOT_ROWS]
    if not files:
        raise DataError(f"{label}: no data file in the directory; known endings are {_endings()}")
    return [(p, f"{label}/{p.relative_to(path)}" if "*" not in label else str(p.relative_to(path))) for p in files]


def read_rows(path: Path, label: str, reject: Reject | None = None) -> Iterator[tuple[str, Row]]:
    """Yield (origin, row) of one file; origin is "name:line" (for JSON arrays, Parquet and Arrow the n-th row).

    A text file gives a row `{"text": line}` for each line, as `datasets` does. Raises DataError naming the file, the
    line and the remedy for anything that cannot be read; a single bad line is given to `reject` instead, if there is
    one.
    """
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{label}: unknown kind of data file {path.suffix!r}; known endings are {_endings()}")
    if path.stat().st_size == 0:
        raise DataError(f"{label}: the file is empty")
    for origin, row in _parsed(path, label, kind):
        if not isinstance(row, _BadRow):
            yield origin, row
        elif reject is None:
            raise DataError(f"{origin}: {row.reason}")
        else:
            reject(origin, row.reason, row.content)


class _BadRow(NamedTuple):
    """A row that cannot be read while those after it can."""

    reason: str
    content: Any


_Parsed = Iterator[tuple[str, "Row | _BadRow"]]


def _parsed(path: Path, label: str, kind: str) -> _Parsed:
    try:
        if kind in _BINARY_READERS:
            yield from _BINARY_READERS[kind](path, label)
        else:
            with _open_bytes(path) as f:
                if kind == "jsonl":
                    yield from _jsonl(f, label)
                else:
                    text = io.TextIOWrapper(f, encoding="utf-8-sig", newline="")
                    yield from _TEXT_READERS[kind](text, label)
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


def _open_bytes(path: Path) -> io.BufferedReader:
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return open(path, "rb")
    # Arrow notices a cut-off stream, which Python's own zstandard reader does not
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), 1 << 20)


def _jsonl(lines: Iterable[bytes | str], label: str, first: int = 1) -> _Parsed:
    for number, line in enumerate(lines, first):
        origin = f"{label}:{number}"
        try:
            text = line if isinstance(line, str) else line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            text = error.object.decode("utf-8", "replace")
            yield origin, _BadRow(f"not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8", text)
            continue
        if text.strip():
            yield origin, _object(text)


def _json(f: TextIO, label: str) -> _Parsed:
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
            yield f"{label}:{index}", _checked(row, row)
    elif first.strip() == "{":
        raise DataError(f"{label}: one JSON object; expected a list of objects, or one object a line")
    else:
        yield from _jsonl(itertools.chain([first], f), label, blank + 1)


def _csv(f: TextIO, label: str, delimiter: str = ",") -> _Parsed:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(f, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                extra = "more" if None in row else "fewer"
                reason = f"{extra} fields than the header's {len(reader.fieldnames or [])}: check quotes"
                values = [value for value in row.values() if isinstance(value, str)]
                content = [*values, *row.get(None, [])]
                yield f"{label}:{reader.line_num}", _BadRow(reason, content)
            else:
                yield f"{label}:{reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{label}:{reader.line_num}: not valid CSV: {error}") from error


def _tsv(f: TextIO, label: str) -> _Parsed:
    return _csv(f, label, "\t")


def _text(f: TextIO, label: str) -> _Parsed:
    for number, line in enumerate(f, 1):
        if line.strip():
            yield f"{label}:{number}", {"text": line.rstrip("\r\n")}


_TEXT_READERS: dict[str, Callable[[TextIO, str], _Parsed]] = {"json": _json, "csv": _csv, "tsv": _tsv, "text": _text}


def _parquet(path: Path, label: str) -> _Parsed:
    # buffering ahead would hold all of the file that was read
    with pq.ParquetFile(path, pre_buffer=False) as file:
        together = batch_rows(table_bytes(file), file.metadata.num_rows)
        yield from _rows(file.iter_batches(batch_size=together), label)


def _arrow(path: Path, label: str) -> _Parsed:
    """An Arrow IPC file, or the bare stream that `datasets` writes."""
    with pa.memory_map(str(path)) as source:
        try:
            file = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            yield from _rows(pa.ipc.open_stream(source), label)
        else:
            yield from _rows((file.get_batch(i) for i in range(file.num_record_batches)), label)


def _rows(batches: Iterable[pa.RecordBatch], label: str) -> _Parsed:
    number = 0
    for batch in batches:
        step = batch_rows(batch.nbytes, len(batch))
        for first in range(0, len(batch), step):
            for row in batch.slice(first, step).to_pylist():
                number += 1
                yield f"{label}:{number}", PaddedRow(row)


def batch_rows(size: int, rows: int) -> int:
    """How many rows of a table of `size` bytes to hold at once: BATCH_ROWS, or fewer where rows are large."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(size, 1)))


def _megatron(path: Path, label: str) -> _Parsed:
    for number, ids in enumerate(megatron.documents(path, label), 1):
        yield f"{label}:{number}", {"input_ids": ids.tolist()}


_BINARY_READERS = {"parquet": _parquet, "arrow": _arrow, "megatron": _megatron}


def _array(text: str, label: str) -> list[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{label}:{error.lineno}: {_not_json(error)}") from error
    except RecursionError as error:
        raise DataError(f"{label}: not valid JSON (nested too deeply)") from error


def _object(text: str) -> Row | _BadRow:
    """The object of one line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return _BadRow(_not_json(error), text)
    except RecursionError:
        return _BadRow("not valid JSON (nested too deeply)", text)
    return _checked(value, text)


def _checked(value: Any, content: Any) -> Row | _BadRow:
    if isinstance(value, dict):
        return value
    return _BadRow(f"a row must be a JSON object, found {type(value).__name__}", content)


def _not_json(error: json.JSONDecodeError) -> str:
    return f"not valid JSON ({error.msg} at column {error.colno})"


def _endings() -> str:
    return ", ".join(KINDS) + ", text also with .gz or .zst (Parquet compresses itself)"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
