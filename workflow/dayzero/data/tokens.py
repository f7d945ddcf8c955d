"""The token store of one split: flat arrays on disk, written in one pass and read through memory maps, so that memory
grows with neither.

Documents lie in row order, so a row is one contiguous slice:

    input_ids.npy         int32 [tokens]
    loss_mask.npy         bool  [tokens]  True: the token is a supervised label; never a document's first token
    document_offsets.npy  int64 [D + 1]   document d holds tokens [offsets[d], offsets[d + 1]): the cu_seqlens of the
                                          whole split
    row_offsets.npy       int64 [R + 1]   row r holds documents [offsets[r], offsets[r + 1])
    document_ids.npy      int64 [D]       index of the document's source row in the split's Parquet file

Shapes: B rows of a batch, T tokens of a row, D documents, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dayzero.errors import DataError

IGNORE = -100
"""The label of a position that predicts nothing."""
FILL = -1
"""Stands for a row that is not there: all padding, no labels."""

_CHUNK = 2**20

_DTYPES = {
    "input_ids": np.int32,
    "loss_mask": np.bool_,
    "document_offsets": np.int64,
    "row_offsets": np.int64,
    "document_ids": np.int64,
}


@dataclass(frozen=True)
class Row:
    """One row: documents one after another, none of which may attend to another."""

    input_ids: NDArray[np.int64]
    """[T]"""
    labels: NDArray[np.int64]
    """[T], already shifted: labels[t] is what position t must predict; IGNORE at every document's last token."""
    position_ids: NDArray[np.int64]
    """[T], from 0 in each document."""
    document_ids: NDArray[np.int64]
    """[documents of the row], indices of the source rows."""
    cu_seqlens: NDArray[np.int32]
    """[documents of the row + 1], where each document starts in the row, and the row's length."""


class TokenRows:
    """The rows of one split, `store/tokens/{key}/train` or `.../validation`.

    Args:
        path: the split's directory.
        seq_len: the longest row the caller accepts; longer ones raise DataError. None: any.
        packed: False views each document as a row of its own, for models that leak across packed documents.
    """

    def __init__(self, path: str | Path, seq_len: int | None = None, packed: bool = True) -> None:
        self.path, self.packed = Path(path), packed
        arrays = {name: _open(self.path, name) for name in _DTYPES}
        self._input_ids, self._loss_mask = arrays["input_ids"], arrays["loss_mask"]
        self._document_offsets, self._document_ids = arrays["document_offsets"], arrays["document_ids"]
        documents = len(self._document_ids)
        self._row_offsets = arrays["row_offsets"]
        if (
            self._row_offsets[-1] != documents
            or len(self._document_offsets) != documents + 1
            or not self._document_offsets[-1] == len(self._input_ids) == len(self._loss_mask)
        ):
            raise DataError(f"{self.path}: the arrays do not belong together: delete the directory and tokenize again")
        if seq_len is not None and (longest := self.longest()) > seq_len:
            raise DataError(
                f"{self.path}: a row has {longest} tokens, more than tokenize.seq_len {seq_len}: tokenize again"
            )

    def __reduce__(self) -> tuple[type[TokenRows], tuple[Path, None, bool]]:
        return TokenRows, (self.path, None, self.packed)  # a worker opens the maps, it is not sent their bytes

    def __len__(self) -> int:
        return len(self._row_offsets) - 1 if self.packed else len(self._document_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows."""
        return len(self._input_ids)

    def lengths_of(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """[len(rows)] tokens of each given row, 0 for FILL."""
        first, last = self._documents_of(np.asarray(rows, dtype=np.int64))
        return self._document_offsets[last] - self._document_offsets[first]

    def longest(self) -> int:
        """Tokens of the longest row; 0 where there is none."""
        return max((int(part.max(initial=0)) for part in self._chunked_lengths()), default=0)

    def row(self, index: int) -> Row:
        """Row `index` as arrays of its own (copies of the mapped pages)."""
        rows = np.array([index])
        (first,), (last,) = self._documents_of(rows)
        starts = self._document_offsets[first : last + 1] - self._document_offsets[first]
        ids, labels, positions = (array.astype(np.int64) for array in self.batch(rows, starts[-1:]))
        return Row(ids, labels, positions, self._document_ids[first:last].copy(), starts.astype(np.int32))

    def batch(
        self, rows: NDArray[np.int64], widths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
        """Rows end to end, each padded to its width: input ids, labels and position ids as in `Row`, [sum(widths)],
        fewer than 2^31.

        Padding goes on from a row's last document, which cannot see it: a restart of the positions would make
        transformers take a row of one document for a packed one and build a mask where plain causal attention does.
        """
        first, last = self._documents_of(rows)
        starts, stops = self._document_offsets[first], self._document_offsets[last]
        assert (stops - starts <= widths).all()
        places = np.cumsum(widths) - widths
        total = int(widths.sum())
        input_ids, mask = np.zeros(total, np.int32), np.zeros(total, np.bool_)
        for at, start, stop in zip(places.tolist(), starts.tolist(), stops.tolist(), strict=True):
            input_ids[at : at + stop - start] = self._input_ids[start:stop]
            mask[at : at + stop - start] = self._loss_mask[start:stop]
        # A document's first token is never supervised, so the shift cannot reach over a document's or a row's end.
        labels = np.full(total, IGNORE, np.int32)
        np.copyto(labels[:-1], input_ids[1:], where=mask[1:])
        # Positions count from the latest start of a document, or of a row that has none.
        documents = np.maximum(last - first, 1)
        owner = np.repeat(np.arange(len(rows)), documents)
        document = np.arange(len(owner)) + (first - (np.cumsum(documents) - documents))[owner]
        restarts = self._document_offsets[document] + (places - starts)[owner]
        position_ids = np.arange(total, dtype=np.int32)
        position_ids -= np.repeat(restarts.astype(np.int32), np.diff(restarts, append=total))
        return input_ids, labels, position_ids

    def source_rows(self, rows: Sequence[int] | NDArray[np.int64]) -> list[int]:
        """Indices into the split's Parquet file of all documents in the given rows, in order."""
        first, last = self._documents_of(np.asarray(rows, dtype=np.int64))
        counts = last - first
        documents = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
        return self._document_ids[documents].tolist()

    def _documents_of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first document of each row and the one after its last."""
        there = rows >= 0
        first = np.where(there, rows, 0)
        if self.packed:
            first, last = self._row_offsets[first], self._row_offsets[first + 1]
        else:
            last = first + 1
        return first, np.where(there, last, first)

    def _chunked_lengths(self) -> Iterator[NDArray[np.int64]]:
        for start in range(0, max(len(self), 1), _CHUNK):
            stop = min(start + _CHUNK, len(self)) + 1
            edges = self._row_offsets[start:stop] if self.packed else slice(start, stop)
            yield np.diff(self._document_offsets[edges])


class TokenWriter:
    """Writes a split's token store in one pass, row after row: `with TokenWriter(path) as w: w.append(...)`.

    Args:
        path: the split's directory, made if it is missing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.num_documents = self.num_rows = self.num_tokens = 0
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> TokenWriter:
        self._files = {name: open(self.path / f"{name}.npy", "wb") for name in _DTYPES}  # noqa: SIM115
        for name, file in self._files.items():
            _write_header(file, name, 0)
        for name in ("document_offsets", "row_offsets"):
            self._files[name].write(np.zeros(1, np.int64).tobytes())
        return self

    def append(
        self,
        input_ids: NDArray,
        loss_mask: NDArray,
        document_lengths: NDArray,
        documents_per_row: NDArray,
        document_ids: NDArray,
    ) -> None:
        """Write more rows.

        Args:
            input_ids, loss_mask: [T] tokens of all their documents end to end; no document's first is supervised.
            document_lengths: [D] tokens of each document, in row order.
            documents_per_row: [R] documents of each row.
            document_ids: [D] source row of each document, in row order.
        """
        assert len(document_lengths) == len(document_ids) == documents_per_row.sum()
        assert len(input_ids) == len(loss_mask) == document_lengths.sum()
        self._write("input_ids", input_ids)
        self._write("loss_mask", loss_mask)
        self._write("document_offsets", self.num_tokens + np.cumsum(document_lengths, dtype=np.int64))
        self._write("row_offsets", self.num_documents + np.cumsum(documents_per_row, dtype=np.int64))
        self._write("document_ids", document_ids)
        self.num_tokens += len(input_ids)
        self.num_documents += len(document_lengths)
        self.num_rows += len(documents_per_row)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sizes = {
            "input_ids": self.num_tokens,
            "loss_mask": self.num_tokens,
            "document_offsets": self.num_documents + 1,
            "row_offsets": self.num_rows + 1,
            "document_ids": self.num_documents,
        }
        for name, file in self._files.items():
            with file:
                if error is None:
                    _write_header(file, name, sizes[name])

    def _write(self, name: str, array: NDArray) -> None:
        self._files[name].write(np.ascontiguousarray(array, dtype=_DTYPES[name]).data)


def _write_header(file: BinaryIO, name: str, size: int) -> None:
    """The head of a .npy file; numpy leaves room in it for a first dimension that grows."""
    file.seek(0)
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(np.dtype(_DTYPES[name])), "fortran_order": False, "shape": (size,)}
    )


def _open(path: Path, name: str) -> NDArray:
    file = path / f"{name}.npy"
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file} ({error}): delete the directory and tokenize again") from error
    if array.dtype != _DTYPES[name]:
        raise DataError(
            f"{file} holds {array.dtype}, not {np.dtype(_DTYPES[name])}: delete the directory and tokenize again"
        )
    return np.asarray(array)  # still the map: only indexing is faster without its class
