"""The token store of one split: flat arrays on disk, read through memory maps so that memory does not grow with them.

Documents lie in row order, so a row is one contiguous slice:

    input_ids.npy         int32 [tokens]
    loss_mask.npy         bool  [tokens]  True: the token is a supervised label; never a document's first token
    document_offsets.npy  int64 [D + 1]   document d holds tokens [offsets[d], offsets[d + 1])
    row_offsets.npy       int64 [R + 1]   row r holds documents [offsets[r], offsets[r + 1])
    document_ids.npy      int64 [D]       index of the document's source row in the split's Parquet file

Shapes: T tokens of a row, D documents, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dayzero.errors import DataError

IGNORE = -100
"""The label of a position that predicts nothing."""

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


class TokenRows:
    """The rows of one split, `store/tokens/{key}/train` or `.../validation`.

    Args:
        path: the split's directory.
        seq_len: the longest row the caller accepts; longer ones raise DataError. None: any.
        packed: False views each document as a row of its own, for models that leak across packed documents.
    """

    def __init__(self, path: str | Path, seq_len: int | None = None, packed: bool = True) -> None:
        self.path, self.seq_len, self.packed = Path(path), seq_len, packed
        arrays = {name: _open(self.path, name) for name in _DTYPES}
        self._input_ids, self._loss_mask = arrays["input_ids"], arrays["loss_mask"]
        self._document_offsets, self._document_ids = arrays["document_offsets"], arrays["document_ids"]
        documents = len(self._document_ids)
        self._row_offsets = arrays["row_offsets"] if packed else np.arange(documents + 1, dtype=np.int64)
        if self._row_offsets[-1] != documents or self._document_offsets[-1] != len(self._input_ids):
            raise DataError(f"{self.path}: the arrays do not belong together: delete the directory and tokenize again")
        self.lengths: NDArray[np.int64] = np.diff(self._document_offsets[self._row_offsets])
        """[R] tokens of each row."""
        if seq_len is not None and len(self) and self.lengths.max() > seq_len:
            raise DataError(f"{self.path}: a row has {self.lengths.max()} tokens, more than tokenize.seq_len {seq_len}")

    def __reduce__(self) -> tuple[type[TokenRows], tuple[Path, int | None, bool]]:
        return TokenRows, (self.path, self.seq_len, self.packed)  # a worker opens the maps, it is not sent their bytes

    def __len__(self) -> int:
        return len(self._row_offsets) - 1

    @property
    def num_documents(self) -> int:
        """Documents in all rows."""
        return len(self._document_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens in all rows."""
        return len(self._input_ids)

    def row(self, index: int) -> Row:
        """Row `index` as arrays of its own (copies of the mapped pages)."""
        first, last = self._row_offsets[index], self._row_offsets[index + 1]
        offsets = self._document_offsets[first : last + 1]
        start, stop = offsets[0], offsets[-1]
        input_ids = self._input_ids[start:stop].astype(np.int64)
        # A document's first token is never supervised, so shifting the row cannot reach over a document's end.
        labels = np.full_like(input_ids, IGNORE)
        labels[:-1] = np.where(self._loss_mask[start + 1 : stop], input_ids[1:], IGNORE)
        lengths = np.diff(offsets)
        position_ids = np.arange(stop - start) - np.repeat(offsets[:-1] - start, lengths)
        return Row(input_ids, labels, position_ids, np.array(self._document_ids[first:last]))

    def num_label_tokens(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """[len(rows)] supervised tokens of each given row; reads one byte a token of those rows."""
        starts = self._document_offsets[self._row_offsets[np.asarray(rows, dtype=np.int64)]]
        lengths = self.lengths[np.asarray(rows, dtype=np.int64)]
        return np.array(
            [np.count_nonzero(self._loss_mask[s : s + n]) for s, n in zip(starts, lengths, strict=True)], dtype=np.int64
        )

    def source_rows(self, rows: Sequence[int] | NDArray[np.int64]) -> list[int]:
        """Indices into the split's Parquet file of all documents in the given rows, in order."""
        return [int(d) for r in rows for d in self._document_ids[self._row_offsets[r] : self._row_offsets[r + 1]]]


def create_token_store(
    path: str | Path, document_lengths: NDArray, documents_per_row: NDArray, document_ids: NDArray
) -> tuple[np.memmap, np.memmap]:
    """Write a split's offsets and return its writable `input_ids` and `loss_mask` maps, to be filled and flushed.

    Args:
        path: the split's directory, made if it is missing.
        document_lengths: [D] tokens of each document, in row order.
        documents_per_row: [R] documents of each row.
        document_ids: [D] source row of each document, in row order.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    assert len(document_lengths) == len(document_ids) == documents_per_row.sum() > 0
    np.save(path / "document_offsets.npy", _offsets(document_lengths))
    np.save(path / "row_offsets.npy", _offsets(documents_per_row))
    np.save(path / "document_ids.npy", document_ids.astype(np.int64))
    tokens = int(document_lengths.sum())
    input_ids = np.lib.format.open_memmap(path / "input_ids.npy", mode="w+", dtype=np.int32, shape=(tokens,))
    loss_mask = np.lib.format.open_memmap(path / "loss_mask.npy", mode="w+", dtype=np.bool_, shape=(tokens,))
    return input_ids, loss_mask


def write_token_store(
    path: str | Path, documents: Sequence[tuple[Sequence[int], Sequence[bool]]], rows: Sequence[Sequence[int]]
) -> None:
    """Write a small split from memory: `documents` as (token ids, loss mask), `rows` as lists of document indices."""
    order = [d for row in rows for d in row]
    lengths = np.array([len(documents[d][0]) for d in order])
    input_ids, loss_mask = create_token_store(path, lengths, np.array([len(row) for row in rows]), np.array(order))
    input_ids[:] = np.concatenate([documents[d][0] for d in order])
    loss_mask[:] = np.concatenate([documents[d][1] for d in order])
    loss_mask[_offsets(lengths)[:-1]] = False
    input_ids.flush()
    loss_mask.flush()


def _offsets(lengths: NDArray) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


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
    return array
