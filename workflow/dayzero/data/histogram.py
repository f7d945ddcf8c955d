"""A histogram of lengths that needs no range: by powers of two."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


class LengthHistogram:
    """`counts[i]` holds the lengths from 2^(i-1) to below 2^i, `counts[0]` the zeros."""

    def __init__(self) -> None:
        self.counts = np.zeros(64, np.int64)
        self.longest = self.total = 0

    def add(self, lengths: NDArray[np.int64]) -> None:
        """Count some lengths, integers from 0."""
        self.counts += np.bincount(np.frexp(lengths.astype(np.float64))[1], minlength=64)
        self.longest = max(self.longest, int(lengths.max(initial=0)))
        self.total += int(lengths.sum())

    def result(self) -> dict[str, Any]:
        """For a manifest, without the empty end."""
        last = int(np.flatnonzero(self.counts).max(initial=0))
        return {"counts": self.counts[: last + 1].tolist(), "longest": self.longest, "total": self.total}
