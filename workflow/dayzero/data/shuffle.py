"""The order of rows in an epoch, place by place, in memory that does not grow with the rows."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dayzero.data.hashing import mixed

EXACT_ROWS = 2**20
"""Up to so many rows the order is drawn from all orders alike and held in memory (8 bytes a row)."""
ROUNDS = 6


class Order:
    """The orders of a set of rows: one for each seed and epoch, over all places of which each row comes exactly once.

    Beyond EXACT_ROWS an order is a keyed permutation that computes each place on its own: a Feistel network on pairs
    below ceil(sqrt(num_rows)), walked on until it meets a row (https://doi.org/10.1007/3-540-45760-7_9). Up to there
    the order that was drawn last is held: each set of rows needs an Order of its own that lasts as long as the run.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._drawn: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def rows(self, places: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
        """The rows at the given places, integers from 0 to below num_rows, of any shape."""
        assert places.size == 0 or 0 <= places.min() <= places.max() < self.num_rows
        if self.num_rows > EXACT_ROWS:
            return _computed(places, self.num_rows, seed, epoch)
        if self._drawn is None or self._drawn[0] != (seed, epoch):
            self._drawn = (seed, epoch), np.random.default_rng([seed, epoch]).permutation(self.num_rows)
        return self._drawn[1][places]


def _computed(places: NDArray[np.int64], num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
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
