"""Rows out of files: JSON lines, JSON, CSV, text (also compressed), Parquet, Arrow and Megatron, read as a stream.

Files are parsed and never executed: nothing here imports, unpickles or evaluates what a file holds.
"""

from __future__ import annotations

import bz2
import csv
import io
import itertools
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from dayzero.console import log
from dayzero.data import megatron
from dayzero.data.rows import PaddedRow, Row
from dayzero.data.sources import files_below, is_hidden, is_pattern
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
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside the rows of a data set that it saves, and hub repositories hold beside theirs."""
_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|copying|copyright|citation|authors|contributing|changelog|code_of_conduct|security)s?"
    r"([._-].*)?",
    re.IGNORECASE,
)
"""Names of what people write about a data set: no rows, where the ending is none of a table."""
SHOWN = 20
"""Files left out of a folder that are named in the log."""
BATCH_ROWS, BATCH_BYTES = 1000, 32 * 2**20
"""Rows of a columnar file that are in memory at once, and bytes (rows can be large)."""


def data_files(path: Path, label: str) -> list[tuple[Path, str]]:
    """The data files of a file or directory (recursively, sorted) with their names; raises DataError if none."""
    if path.is_file():
        return [(path, label)]
    pattern = is_pattern(label)  # which has matched hidden files only where it says so
    if megatron.partner(Path(label)) and not pattern:  # a directory that holds no more than the pair
        return [(p, label) for p in path.iterdir() if p.suffix == ".idx"]
    files = [p for p in files_below(path) if (pattern or not is_hidden(p.relative_to(path))) and p.name not in NOT_ROWS]
    read = [p for p in files if p.is_file() and _kind(p) and not (_kind(p) == "text" and _ABOUT.fullmatch(p.name))]
    tables = [p for p in read if _kind(p) != "text"]
    _name_left_out(label, path, files, tables or read)
    if not read:
        raise DataError(f"{label}: no data file in the directory; known endings are {_endings()}")
    return [(p, str(p.relative_to(path)) if pattern else f"{label}/{p.relative_to(path)}") for p in tables or read]


def _name_left_out(label: str, path: Path, files: list[Path], read: list[Path]) -> None:
    """Warn of the files of a folder that are not read, texts beside tables among them: they could have been meant."""
    known = {*read, *(megatron.partner(p) for p in read)}
    if others := [str(p.relative_to(path)) for p in files if p not in known]:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        log.warning(
            "WARNING: %s: %d files of the directory are not read as data: %s%s (name a file as the source if it is)",
            label, len(others), ", ".join(others[:SHOWN]), more,
        )  # fmt: skip


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
                    # a byte that is no UTF-8 becomes half a surrogate pair, so that the row it stands in can be told
                    text = io.TextIOWrapper(f, encoding="utf-8-sig", errors="surrogateescape", newline="")
                    yield from _TEXT_READERS[kind](text, label)
    except pa.ArrowException as error:
        raise DataError(f"{label}: cannot be read as {kind}: {_short(error)}: fetch or write it again") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
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
    if compression in ("bz2", "xz"):
        return io.BufferedReader((bz2.open if compression == "bz2" else lzma.open)(path), 1 << 20)
    # Arrow notices a cut-off stream, which Python's own zstandard reader does not
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), 1 << 20)


def _jsonl(lines: Iterable[bytes | str], label: str, first: int = 1) -> _Parsed:
    for number, line in enumerate(lines, first):
        text = line
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
        if text.strip():
            yield f"{label}:{number}", _not_utf8(text) or _object(text)


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
            yield f"{label}:{index}", row
    elif first.strip() == "{":
        raise DataError(f"{label}: one JSON object; expected a list of objects, or one object a line")
    else:
        yield from _jsonl(itertools.chain([first], f), label, blank + 1)


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


def _csv(f: TextIO, label: str, delimiter: str = ",") -> _Parsed:
    csv.field_size_limit(sys.maxsize)
    header: list[str] | None = None
    for number, row in _csv_rows(_CsvLines(f), label, delimiter):
        origin = f"{label}:{number}"
        if header is None:
            if isinstance(row, _BadRow):
                raise DataError(f"{origin}: the header cannot be read: {row.reason}")
            header = row
        elif isinstance(row, _BadRow):
            yield origin, row
        elif len(row) != len(header):
            extra = "more" if len(row) > len(header) else "fewer"
            yield origin, _BadRow(f"{extra} fields than the header's {len(header)}: check quotes", row)
        else:
            yield origin, dict(zip(header, row, strict=True))


def _csv_rows(lines: _CsvLines, label: str, delimiter: str) -> Iterator[tuple[int, list[str] | _BadRow]]:
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
            yield lines.first, _BadRow(f"not valid CSV: {error}", lines.text)  # the reader begins anew at the next line
            continue
        if row:
            yield lines.first, _not_utf8(lines.text) or row


def _tsv(f: TextIO, label: str) -> _Parsed:
    return _csv(f, label, "\t")


def _text(f: TextIO, label: str) -> _Parsed:
    for number, line in enumerate(f, 1):
        if line.strip():
            yield f"{label}:{number}", _not_utf8(line) or {"text": line.rstrip("\r\n")}


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
            for row in _python_rows(batch.slice(first, step)):
                number += 1
                yield f"{label}:{number}", row


def _python_rows(batch: pa.RecordBatch) -> Iterable[Row | _BadRow]:
    """The rows of a batch; bad ones are those with a value that Python does not have, like text that is not UTF-8."""
    try:
        return [PaddedRow(row) for row in batch.to_pylist()]
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            return [_BadRow(f"a value cannot be read ({_short(error)})", None)]
        return itertools.chain.from_iterable(_python_rows(batch.slice(i, 1)) for i in range(len(batch)))


def batch_rows(size: int, rows: int) -> int:
    """How many rows of a table of `size` bytes to hold at once: BATCH_ROWS, or fewer where rows are large."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(size, 1)))


def _megatron(path: Path, label: str) -> _Parsed:
    for number, ids in enumerate(megatron.documents(path, label), 1):
        yield f"{label}:{number}", {"input_ids": ids.tolist()}


_BINARY_READERS = {"parquet": _parquet, "arrow": _arrow, "megatron": _megatron}


def _array(text: str, label: str) -> Iterable[Row | _BadRow]:
    """The rows of a JSON array; read one by one only where one of them cannot be read as it stands."""
    try:
        if not _not_utf8(text):
            return [_checked(row, row) for row in json.loads(text)]
    except json.JSONDecodeError as error:
        raise DataError(f"{label}:{error.lineno}: {_not_json(error)}") from error
    except RecursionError as error:
        raise DataError(f"{label}: {_TOO_DEEP}") from error
    except ValueError:
        pass  # an integer of too many digits
    return _items(text, label)


def _items(text: str, label: str) -> Iterator[Row | _BadRow]:
    at = _SPACE.match(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    more = not text.startswith("]", at)
    try:
        while more:
            _, end = _ANY_DIGITS.raw_decode(text, at)
            yield _not_utf8(text[at:end]) or _object(text[at:end])
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


def _object(text: str) -> Row | _BadRow:
    """The object of one line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return _BadRow(_not_json(error), text)
    except RecursionError:
        return _BadRow(_TOO_DEEP, text)
    except ValueError as error:  # an integer of more digits than Python reads
        return _BadRow(f"cannot be read ({_short(error).partition(';')[0]}): write it as text", text)
    return _checked(value, text)


def _not_utf8(text: str) -> _BadRow | None:
    """What is wrong with a row whose bytes could not all be decoded; None for any other."""
    if text.isascii() or not _ESCAPED.search(text):
        return None
    content = text.encode("utf-8", "surrogateescape")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text ({error.reason} at byte {error.start + 1} of the row): convert it to UTF-8"
        return _BadRow(reason, content.decode("utf-8", "replace"))
    return None


_TOO_DEEP = "not valid JSON (nested too deeply)"
_ANY_DIGITS = json.JSONDecoder(parse_int=str)
_SPACE = re.compile(r"[ \t\r\n]*")
_ESCAPED = re.compile("[\udc80-\udcff]")
"""What Python's surrogateescape makes of bytes that are no UTF-8, and no UTF-8 decodes to."""


def _checked(value: Any, content: Any) -> Row | _BadRow:
    if isinstance(value, dict):
        return value
    return _BadRow(f"a row must be a JSON object, found {type(value).__name__}", content)


def _not_json(error: json.JSONDecodeError) -> str:
    return f"not valid JSON ({error.msg} at column {error.colno})"


def _endings() -> str:
    return ", ".join(KINDS) + ", text also with .gz, .bz2, .xz or .zst (Parquet compresses itself)"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
