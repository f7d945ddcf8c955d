"""Small token stores from memory, and what tests ask of a store that training does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from dayzero.data.tokens import IGNORE, TokenRows, TokenWriter


def write_token_store(
    path: str | Path, documents: Sequence[tuple[Sequence[int], Sequence[bool]]], rows: Sequence[Sequence[int]]
) -> None:
    """Write a split: `documents` as (token ids, loss mask), `rows` as lists of document indices."""
    order = [d for row in rows for d in row]
    lengths = np.array([len(documents[d][0]) for d in order])
    mask = np.concatenate([documents[d][1] for d in order])
    mask[np.cumsum(lengths) - lengths] = False
    with TokenWriter(path) as writer:
        input_ids = np.concatenate([documents[d][0] for d in order])
        writer.append(input_ids, mask, lengths, np.array([len(row) for row in rows]), np.array(order))


def num_documents(rows: TokenRows) -> int:
    """Documents in all rows."""
    return len(TokenRows(rows.path, packed=False))


def num_label_tokens(rows: TokenRows) -> list[int]:
    """Supervised tokens of each row."""
    return [int(np.count_nonzero(rows.row(index).labels != IGNORE)) for index in range(len(rows))]
