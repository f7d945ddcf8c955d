"""Best-fit-decreasing bin packing: documents into rows of at most `seq_len` tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
