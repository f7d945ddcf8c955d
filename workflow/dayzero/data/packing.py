"""Best-fit bin packing: a stream of documents into rows of at most `seq_len` tokens, in one pass and bounded memory.

Documents gather in a window. A full window is packed best-fit-decreasing; its full rows leave, the emptiest go back to
be packed with what comes next, so that a document that found no fitting partner meets many more. What leaves depends on
the documents and their order alone, and is exactly the offline packing where everything fits into one window.

Shapes: D documents, R rows, T tokens of all of them end to end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW_TOKENS, WINDOW_DOCUMENTS = 2**23, 2**20
"""A window is full with so many tokens (5 bytes each, about three times in memory) or documents."""
WINDOW_ROWS = 256
"""Rows that a window holds at least, however long they are."""
CARRIED = 4
"""At most a quarter of a window goes back to be packed again."""


@dataclass(frozen=True)
class Documents:
    """Documents end to end."""

    input_ids: NDArray[np.int32]
    """[T]"""
    loss_mask: NDArray[np.bool_]
    """[T]"""
    lengths: NDArray[np.int64]
    """[D] tokens of each."""
    document_ids: NDArray[np.int64]
    """[D] source row of each."""

    def take(self, order: NDArray[np.int64]) -> Documents:
        """These documents, in this order."""
        lengths = self.lengths[order]
        starts = (np.cumsum(self.lengths) - self.lengths)[order]
        ids, mask = np.empty(lengths.sum(), np.int32), np.empty(lengths.sum(), np.bool_)
        at = 0
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            ids[at : at + length] = self.input_ids[start : start + length]
            mask[at : at + length] = self.loss_mask[start : start + length]
            at += length
        return Documents(ids, mask, lengths, self.document_ids[order])


class _Window:
    """Documents waiting to be packed, in a buffer that is filled again and again."""

    def __init__(self, tokens: int) -> None:
        self._input_ids, self._loss_mask = np.empty(tokens, np.int32), np.empty(tokens, np.bool_)
        self._lengths: list[NDArray[np.int64]] = []
        self._document_ids: list[NDArray[np.int64]] = []
        self.num_tokens = self.num_documents = 0

    def add(self, part: Documents) -> None:
        start, stop = self.num_tokens, self.num_tokens + len(part.input_ids)
        if stop > len(self._input_ids):
            more = stop - len(self._input_ids) + len(self._input_ids) // 8
            self._input_ids = np.concatenate([self._input_ids, np.empty(more, np.int32)])
            self._loss_mask = np.concatenate([self._loss_mask, np.empty(more, np.bool_)])
        self._input_ids[start:stop], self._loss_mask[start:stop] = part.input_ids, part.loss_mask
        self._lengths.append(part.lengths)
        self._document_ids.append(part.document_ids)
        self.num_tokens, self.num_documents = stop, self.num_documents + len(part.lengths)

    def documents(self) -> Documents:
        """All of them, as views that the next `add` after `clear` writes over."""
        lengths, document_ids = np.concatenate(self._lengths), np.concatenate(self._document_ids)
        used = slice(0, self.num_tokens)
        return Documents(self._input_ids[used], self._loss_mask[used], lengths, document_ids)

    def clear(self) -> None:
        self._lengths, self._document_ids = [], []
        self.num_tokens = self.num_documents = 0


def pack_stream(
    parts: Iterable[Documents], seq_len: int, window_tokens: int | None = None
) -> Iterator[tuple[Documents, NDArray[np.int64]]]:
    """Pack documents of 1 to seq_len tokens as they come.

    Args:
        parts: the documents in their order; how they are cut into parts changes where windows end.
        seq_len: tokens a row holds.
        window_tokens: tokens of a window. None: WINDOW_TOKENS, or more for long rows.

    Yields documents in row order with the number of documents in each row, [R]; never an empty share.
    """
    window_tokens = window_tokens or max(WINDOW_TOKENS, WINDOW_ROWS * seq_len)
    waiting = _Window(window_tokens)
    for part in parts:
        waiting.add(part)
        if waiting.num_tokens >= window_tokens or waiting.num_documents >= WINDOW_DOCUMENTS:
            window = waiting.documents()
            order, counts, back = pack_window(window.lengths, seq_len)
            carried = window.take(back)
            yield window.take(order), counts
            waiting.clear()
            waiting.add(carried)
    if waiting.num_documents:
        window = waiting.documents()
        order, counts = best_fit_rows(window.lengths, seq_len)
        yield window.take(order), counts


def pack_window(
    lengths: NDArray[np.int64], seq_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pack a window and take its emptiest rows back out: at most a quarter of its tokens and documents, no full row.

    Returns:
        [D'] document indices in row order, [R] documents of each row, and the indices taken out, ascending.
    """
    order, counts = best_fit_rows(lengths, seq_len)
    row_of = np.repeat(np.arange(len(counts)), counts)
    filled = np.bincount(row_of, weights=lengths[order]).astype(np.int64)
    emptiest = np.argsort(filled, kind="stable")
    few_tokens = np.cumsum(filled[emptiest]) <= lengths.sum() // CARRIED
    few_documents = np.cumsum(counts[emptiest]) <= len(lengths) // CARRIED
    taken = np.zeros(len(counts), dtype=bool)
    taken[emptiest[few_tokens & few_documents & (filled[emptiest] < seq_len)]] = True
    return order[~taken[row_of]], counts[~taken], np.sort(order[taken[row_of]])


def best_fit_rows(lengths: NDArray[np.int64], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pack documents into few rows; the same lengths always give the same rows.

    From the longest document on, each goes to the row it fits most tightly (https://arxiv.org/abs/2404.10830), at most
    22 % above the fewest possible rows and far closer in practice. Rows and the documents in them then stand in the
    order of their documents. Takes O(D log D + D * seq_len / 64).

    Args:
        lengths: [D] tokens of each document, from 1 to seq_len.
        seq_len: tokens a row holds.

    Returns:
        [D] document indices in row order, and [R] documents of each row.
    """
    assert len(lengths) == 0 or 1 <= lengths.min() <= lengths.max() <= seq_len
    row_of = np.empty(len(lengths), dtype=np.int64)
    open_rows: list[list[int]] = [[] for _ in range(seq_len + 1)]  # by tokens left
    left = 0  # bit n is set where open_rows[n] is not empty
    rows = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        fitting = left >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                left ^= 1 << room
        else:
            room, row, rows = seq_len, rows, rows + 1
        row_of[document] = row
        if room > length:
            open_rows[room - length].append(row)
            left |= 1 << (room - length)
    first = np.full(rows, len(lengths))
    np.minimum.at(first, row_of, np.arange(len(lengths)))
    return np.argsort(first[row_of], kind="stable"), np.bincount(row_of, minlength=rows)[np.argsort(first)]
