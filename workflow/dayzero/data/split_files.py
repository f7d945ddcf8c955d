"""The splits' Parquet files, written from the rows as they were read, and what a manifest says about each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dayzero.data.spill import Spill, first_of_groups
from dayzero.data.splits import LEFT_OUT, SPLITS
from dayzero.data.stored_table import batch_rows, open_table, table_bytes
from dayzero.files import sha256_file

ROW_GROUP_BYTES = 8 * 2**20
"""Size in memory of a row group: a reader holds one, and the file's footer holds a few hundred bytes for each."""
_RESERVED = 1 << 63


class RowGroups:
    """Writes a Parquet file in row groups of about ROW_GROUP_BYTES, from tables of any size."""

    def __init__(self, file: Path, schema: pa.Schema) -> None:
        self._schema = schema
        # Nobody looks for rows by value, and least and greatest texts would stand in the footer for each row group.
        self._writer = pq.ParquetWriter(file, schema, compression="zstd", write_statistics=False)
        self._waiting: list[pa.RecordBatch] = []
        self._bytes = 0

    def __enter__(self) -> RowGroups:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._write()
        finally:
            self._writer.close()

    def append(self, batch: pa.RecordBatch) -> None:
        """More rows."""
        self._waiting.append(batch)
        self._bytes += batch.nbytes
        if self._bytes >= ROW_GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting, self._schema))
        self._waiting, self._bytes = [], 0


@dataclass
class ReadRows:
    """Normalised rows on disk, in reading order."""

    file: Path
    key: str
    """The config key that names the sources."""
    sources: list[str]
    first: int = 0
    """The number of the first row, counted over everything that was read."""
    ends: list[int] = field(default_factory=list)
    """Rows up to the end of each source, in their order."""

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return self.ends[-1] if self.ends else 0

    @property
    def rows(self) -> slice:
        """Their numbers."""
        return slice(self.first, self.first + self.num_rows)


def leave_out_copies(contents: Spill, split: NDArray[np.int8], parts: Sequence[ReadRows]) -> int:
    """Mark rows that have the content of an earlier row of their part as LEFT_OUT; returns how many."""
    found = 0
    ends = np.cumsum([part.num_rows for part in parts])
    for records in contents.buckets():
        rows = records[:, 2].astype(np.int64)
        part = np.searchsorted(ends, rows, side="right")
        copies = ~first_of_groups(records, 2)
        copies[1:] &= part[1:] == part[:-1]
        split[rows[copies]] = LEFT_OUT
        found += int(copies.sum())
    return found


def id_key(name: str) -> bytes:
    """16 bytes for an id."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def note_id(ids: Spill, name: str, row: int) -> None:
    """Remember a row's id, and that `NAME#2` is taken where it is called so."""
    ids.add(id_key(name), row)
    base, sign, number = name.rpartition("#")
    if sign and number.isascii() and number.isdigit() and len(number) < 10:
        ids.add(id_key(base), _RESERVED | int(number))


def number_ids(ids: Spill, split: NDArray[np.int8], numbers: NDArray[np.int32]) -> None:
    """Give the rows whose id an earlier row has a number from 2 on, the one that their id then ends with."""
    for records in ids.buckets():
        reserved = records[:, 2] >= _RESERVED
        kept = reserved.copy()
        kept[~reserved] = split[records[~reserved, 2]] != LEFT_OUT
        records, reserved = records[kept], reserved[kept]
        edges = np.append(np.flatnonzero(first_of_groups(records, 2)), len(records))
        for group in np.flatnonzero(np.diff(edges) > 1).tolist():
            mine = slice(edges[group], edges[group + 1])
            rows = records[mine][~reserved[mine], 2][1:]
            taken = records[mine][reserved[mine], 2] - np.uint64(_RESERVED)
            free = np.setdiff1d(np.arange(2, 2 + len(rows) + len(taken)), taken)
            numbers[rows] = free[: len(rows)]


def write_splits(
    folder: Path, parts: Sequence[ReadRows], split: NDArray[np.int8], numbers: NDArray[np.int32]
) -> dict[str, dict[str, Any]]:
    """Write NAME.parquet for each split that has rows, and return what the manifest says about it, by name."""
    writers: dict[int, RowGroups] = {}
    counts: dict[int, NDArray[np.int64]] = {}
    with ExitStack() as stack:

        def writer(number: int, schema: pa.Schema) -> RowGroups:
            if number not in writers:
                file = folder / f"{SPLITS[number]}.parquet"
                writers[number] = stack.enter_context(RowGroups(file, schema))
            return writers[number]

        for part in parts:
            if part.num_rows:
                _distribute(part, split[part.rows], numbers[part.rows], writer, counts)
    found: dict[str, dict[str, Any]] = {}
    for number in sorted(counts):
        file = folder / f"{SPLITS[number]}.parquet"
        rows = int(counts[number].sum())
        entry = {"file": file.name, "rows": rows, "source_rows": counts[number].tolist(), "sha256": sha256_file(file)}
        found[SPLITS[number]] = entry
    return found


def _distribute(
    part: ReadRows,
    split: NDArray[np.int8],
    numbers: NDArray[np.int32],
    writer: Callable[[int, pa.Schema], RowGroups],
    counts: dict[int, NDArray[np.int64]],
) -> None:
    """The rows of one part to the writers of their splits."""
    start = 0
    with open_table(part.file) as source:
        together = batch_rows(table_bytes(source), source.metadata.num_rows)
        for batch in source.iter_batches(batch_size=together, use_threads=False):
            stop = start + len(batch)
            where, number = np.asarray(split[start:stop]), np.asarray(numbers[start:stop])
            origin = np.searchsorted(part.ends, np.arange(start, stop), side="right")
            start = stop
            if number.any():
                names = batch.column("id").to_pylist()
                for i in np.flatnonzero(number).tolist():
                    names[i] = f"{names[i]}#{number[i]}"
                batch = batch.set_column(0, "id", pa.array(names, pa.string()))
            for code in np.unique(where[where != LEFT_OUT]).tolist():
                writer(code, source.schema_arrow).append(batch.filter(pa.array(where == code)))
                counts.setdefault(code, np.zeros(len(part.ends), np.int64))
                counts[code] += np.bincount(origin[where == code], minlength=len(part.ends))
