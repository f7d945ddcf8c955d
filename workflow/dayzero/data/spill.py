"""Numbers about every row of a corpus, brought together by a key, in memory that does not grow with the rows.

Records go to a file by the highest 8 bits of their key; one share of the keys after another is then read back and
sorted. Only records of one key are held together, however many there are: 24 bytes each.

Shapes: N records, W numbers of a record, of which the first is its key, or the beginning of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

BUCKETS = 256
HELD_BYTES = 2**24
"""Records in memory before they go to the file; few rows never do."""


class Spill:
    """Collects records and gives them back sorted.

    Args:
        file: where records go that memory is not to hold; made when it is needed, deleted at the end of `with`.
        width: W.
    """

    def __init__(self, file: Path, width: int) -> None:
        self._file, self._width = file, width
        self._bytes = bytearray()  # of single records, big-endian
        self._held: list[NDArray[np.uint64]] = []
        self._held_bytes = 0
        self._starts: list[NDArray[np.int64]] = []  # of each time that memory was emptied: [BUCKETS + 1] records before

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.unlink(missing_ok=True)

    def add(self, key: bytes, number: int) -> None:
        """One record: a key of (W - 1) * 8 bytes and a number of the row."""
        self._bytes += key
        self._bytes += number.to_bytes(8, "big")
        if len(self._bytes) >= HELD_BYTES // 8:
            self._hold_bytes()

    def add_all(self, records: NDArray[np.uint64]) -> None:
        """Records [N, W]."""
        assert records.shape[1] == self._width
        self._held.append(records)
        self._held_bytes += records.nbytes
        if self._held_bytes >= HELD_BYTES:
            self._empty()

    def buckets(self) -> Iterator[NDArray[np.uint64]]:
        """All records, [N, W] at a time, in ascending order; those with equal first numbers come together."""
        self._hold_bytes()
        held, starts = self._by_bucket()
        for bucket in range(BUCKETS):
            parts = [self._read(done, bucket) for done in self._starts]
            parts.append(held[starts[bucket] : starts[bucket + 1]])
            records = np.concatenate(parts)
            yield records[np.lexsort(records.T[::-1])]

    def _hold_bytes(self) -> None:
        if self._bytes:
            records = np.frombuffer(bytes(self._bytes), ">u8").reshape(-1, self._width).astype(np.uint64)
            self._bytes.clear()
            self.add_all(records)

    def _by_bucket(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The records in memory by bucket, and where each bucket starts, [BUCKETS + 1]."""
        records = np.concatenate([np.empty((0, self._width), np.uint64), *self._held])
        bucket = (records[:, 0] >> np.uint64(56)).astype(np.uint8)
        starts = np.concatenate([[0], np.cumsum(np.bincount(bucket, minlength=BUCKETS))])
        return records[np.argsort(bucket, kind="stable")], starts

    def _empty(self) -> None:
        records, starts = self._by_bucket()
        before = self._starts[-1][-1] if self._starts else 0
        with open(self._file, "ab") as file:
            file.write(records.data)
        self._starts.append(starts + before)
        self._held, self._held_bytes = [], 0

    def _read(self, starts: NDArray[np.int64], bucket: int) -> NDArray[np.uint64]:
        first, last = int(starts[bucket]), int(starts[bucket + 1])
        size = self._width * 8
        numbers = np.fromfile(self._file, np.uint64, (last - first) * self._width, offset=first * size)
        return numbers.reshape(-1, self._width)


def first_of_groups(records: NDArray[np.uint64], key: int) -> NDArray[np.bool_]:
    """[N] whether each of the sorted records is the first of its key, its first `key` numbers."""
    first = np.ones(len(records), np.bool_)
    first[1:] = (records[1:, :key] != records[:-1, :key]).any(axis=1)
    return first


def row_array(file: Path, rows: int, dtype: type) -> NDArray:
    """Zeros, one for each row, in a file: the system may take their memory back."""
    return np.memmap(file, dtype, "w+", shape=(rows,)) if rows else np.zeros(0, dtype)
