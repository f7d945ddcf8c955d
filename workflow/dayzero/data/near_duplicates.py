"""Near-duplicates: rows that share most of their runs of words, looked for among some of a split's rows.

Of two rows chosen on their own, from few of many, hardly ever both would be looked at. So rows go into groups by the
least of their runs' hashes, which two rows share as often as their runs are the same (A. Broder,
https://doi.org/10.1109/SEQUEN.1997.666900), and a hash of it chooses groups whole. Only of groups so large that some of
their rows will be chosen anyway are rows chosen on their own: one group might else decide what is found.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from dayzero.data.hashing import mixed
from dayzero.data.ngrams import Words, words
from dayzero.data.spill import Spill, first_of_groups

SHINGLE, PERMUTATIONS = 5, 64
"""Words in what near-duplicates are compared by, and the length of a row's MinHash."""
LARGE = 4
"""A group is large where so many of its rows are to be chosen on their own."""


def records(found: Words, contents: NDArray[np.uint64], first_row: int) -> NDArray[np.uint64]:
    """What `chosen_rows` is to know of the rows `first_row`, `first_row + 1`, ...: group, content and number, [N, 3].

    Rows of fewer than SHINGLE words have none.
    """
    grams, text = found.ngrams(SHINGLE)
    if not len(grams):
        return np.empty((0, 3), np.uint64)
    rows, starts = np.unique(text, return_index=True)
    groups = mixed(np.minimum.reduceat(grams, starts))  # mixed again: the least of many hashes is small
    return np.stack([groups, contents[rows], (first_row + rows).astype(np.uint64)], axis=1)


def chosen_rows(rows: Spill, wanted: int, total: int) -> NDArray[np.int64]:
    """About `wanted` of `total` rows, ascending; of those with the same content only the first can be among them.

    The choice depends on nothing but the rows' texts, not on their order.
    """
    limit = np.uint64(min(2**64 * wanted // total, 2**64) - 1)
    chosen = [np.empty(0, np.uint64)]
    for part in rows.buckets():
        part = part[first_of_groups(part, 2)]
        group = np.cumsum(first_of_groups(part, 1)) - 1
        large = np.bincount(group)[group] * wanted >= LARGE * total
        chosen.append(part[np.where(large, part[:, 1], part[:, 0]) <= limit, 2])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


class NearDuplicates:
    """Finds rows whose runs of words overlap with an earlier row's, by MinHash."""

    def __init__(self, similarity: float) -> None:
        self._index = MinHashLSH(threshold=similarity, num_perm=PERMUTATIONS)
        self.rows = self.found = 0

    def see(self, texts: pa.Array) -> None:
        """Look at texts of at least SHINGLE words."""
        grams, text = words(texts).ngrams(SHINGLE)
        starts = np.flatnonzero(np.diff(text, prepend=-1))
        for shingles in np.split(grams, starts[1:]) if len(grams) else ():
            signature = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
            signature.update_batch((np.unique(shingles) & np.uint64(2**32 - 1)).tolist())
            self.found += bool(self._index.query(signature))
            self._index.insert(self.rows, signature, check_duplication=False)
            self.rows += 1
