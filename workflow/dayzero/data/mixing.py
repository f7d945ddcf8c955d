"""Several sources drawn by weight: which row each sample of a run is, as a pure function of its number and the seed.

The rows of a source lie together in the token store. Sample k belongs to the source whose turn it is, in a repeating
order in which every source is at any time within one row of its share (R. Tijdeman, The chairman assignment problem,
https://doi.org/10.1016/0012-365X(80)90269-1). The n-th sample of a source is row n modulo its size, in an order of its
own for each pass.

Shapes: S sources, P samples of the repeating order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dayzero.data.packing import Documents
from dayzero.data.shuffle import Order
from dayzero.errors import ConfigError

LONGEST_ORDER = 10_000
"""Weights are exact where such an order can hold them, else rounded to it."""


class Mix:
    """The order of a run's samples over several sources.

    Args:
        rows: [S] rows of each source, in the order in which they lie in the token store.
        weights: [S] relative shares of the samples.
        names: [S] for messages.

    Raises ConfigError where a source has no row.
    """

    def __init__(self, rows: Sequence[int], weights: Sequence[float], names: Sequence[str]) -> None:
        assert len(rows) == len(weights) == len(names) > 1
        for name, count in zip(names, rows, strict=True):
            if not count:
                raise ConfigError(f"data.weights: no training row is left of {name}: remove it from data.source")
        self.names = list(names)
        self.sizes = np.array(rows, dtype=np.int64)
        self._first = np.cumsum(self.sizes) - self.sizes
        self._orders = [Order(count) for count in rows]
        self.shares = np.array(_integers(weights), dtype=np.int64)
        """[S] samples of each source in P."""
        self.order = _even_order(self.shares)
        """[P] the source of each sample."""
        self._earlier = np.empty_like(self.order)  # samples of the same source before it
        for source, share in enumerate(self.shares):
            self._earlier[self.order == source] = np.arange(share)

    def rows(self, samples: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
        """The row of each sample."""
        periods, places = np.divmod(samples, len(self.order))
        sources = self.order[places]
        turns = periods * self.shares[sources] + self._earlier[places]
        result = np.empty_like(samples)
        for source in np.unique(sources).tolist():
            here = sources == source
            passes, at = np.divmod(turns[here], self.sizes[source])
            found = np.empty_like(at)
            for number in np.unique(passes).tolist():
                now = passes == number
                found[now] = self._orders[source].rows(at[now], seed + (source << 32), number)
            result[here] = self._first[source] + found
        return result

    def counts(self, num_samples: int) -> NDArray[np.int64]:
        """[S] samples of each source among the first `num_samples`."""
        periods, rest = divmod(num_samples, len(self.order))
        return periods * self.shares + np.bincount(self.order[:rest], minlength=len(self.shares))

    def describe(self, num_samples: int) -> list[dict[str, Any]]:
        """What a run's summary says of each source: its share, its samples, and passes over its rows."""
        return [
            {"source": name, "share": int(share) / len(self.order), "samples": int(n), "passes": float(n / size)}
            for name, share, n, size in zip(self.names, self.shares, self.counts(num_samples), self.sizes, strict=True)
        ]


def by_source(parts: Iterable[Documents], source_rows: Sequence[int]) -> Iterator[tuple[int, Documents]]:
    """The documents with their source, cut where a new source begins; `source_rows`: source rows of each, in order."""
    bounds = np.cumsum(source_rows)
    for part in parts:
        sources = np.searchsorted(bounds, part.document_ids, side="right")
        for source in np.unique(sources).tolist():
            here = np.flatnonzero(sources == source)
            yield source, part if len(here) == len(sources) else part.take(here)


def _integers(weights: Sequence[float]) -> list[int]:
    """The weights as the smallest integers of the same ratio, whose sum is at most LONGEST_ORDER; none is 0."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    counts = [int(weight * scale) for weight in exact]
    divisor = gcd(*counts)
    counts = [count // divisor for count in counts]
    if sum(counts) <= LONGEST_ORDER:
        return counts
    wanted = [weight / sum(exact) * LONGEST_ORDER for weight in exact]
    counts = [max(1, int(share)) for share in wanted]
    missing = sorted(range(len(counts)), key=lambda i: counts[i] - wanted[i])  # largest remainder first
    for i in missing[: max(0, LONGEST_ORDER - sum(counts))]:
        counts[i] += 1
    return counts


def _even_order(shares: NDArray[np.int64]) -> NDArray[np.int64]:
    """[P] sources in an order in which source s has k * share / P of the first k, give or take less than one."""
    total, sources = int(shares.sum()), len(shares)
    slack = 2 * sources - 2
    done = np.zeros(sources, dtype=np.int64)
    order = np.empty(total, dtype=np.int64)
    for k in range(1, total + 1):
        owed = shares * k - done * total  # in P-ths of a sample
        urgency = np.where(owed * slack >= total, (total * (slack - 1) / slack - owed) / shares, np.inf)
        order[k - 1] = chosen = int(np.argmin(urgency))
        done[chosen] += 1
    return order
