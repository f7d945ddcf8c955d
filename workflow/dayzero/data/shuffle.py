"""The order of rows in an epoch, place by place, in memory that does not grow with the rows."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dayzero.data.hashing import mixed

EXACT_ROWS = 2**20
"""Up to so many rows the order is drawn from all orders alike and held in memory (8 bytes a row)."""
ROUNDS = 6


def shuffled(places: NDArray[np.int64], num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The rows at the given places of the order of (seed, epoch); over all places each row comes exactly once.

    Beyond EXACT_ROWS the order is a keyed permutation that computes each place on its own: a Feistel network on pairs
    below ceil(sqrt(num_rows)), walked on until it meets a row (https://doi.org/10.1007/3-540-45760-7_9).

    Args:
        places: integers from 0 to below num_rows, of any shape.
    """
    assert places.size == 0 or 0 <= places.min() <= places.max() < num_rows
    if num_rows <= EXACT_ROWS:
        return _permutation(num_rows, seed, epoch)[places]
    side = np.uint64(math.isqrt(num_rows - 1) + 1)
    keys = np.random.default_rng([seed, epoch]).integers(2**64, size=ROUNDS, dtype=np.uint64)
    rows = places.astype(np.uint64).ravel()
    walking = np.arange(rows.size)
    while walking.size:
        left, right = np.divmod(rows[walking], side)
        for key in keys:
            left, right = right, (left + mixed(right ^ key) % side) % side
        rows[walking] = left * side + right
        walking = walking[rows[walking] >= num_rows]
    return rows.astype(np.int64).reshape(places.shape)


@lru_cache(maxsize=2)  # a batch reaches over at most two epochs, unless it is larger than an epoch
def _permutation(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)
