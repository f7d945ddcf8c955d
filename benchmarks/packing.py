"""How full rows get: documents packed as they come, window after window, against best-fit-decreasing over all at once.

    python benchmarks/packing.py

No tokenizer is involved: the lengths of documents are drawn from distributions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
from dayzero.data.packing import Documents, best_fit_rows, pack_stream
from numpy.typing import NDArray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--seq-len", type=int, default=2048)
    args = parser.parse_args()
    print(f"{args.documents:,} documents, rows of {args.seq_len:,} tokens")
    print(f"{'lengths':48} {'offline':>10} {'one pass':>10} {'more rows':>10}")
    for name, lengths in drawn(args.documents, args.seq_len).items():
        lengths = np.clip(lengths.astype(np.int64), 1, args.seq_len)
        offline = len(best_fit_rows(lengths, args.seq_len)[1])
        rows = sum(len(counts) for _, counts in pack_stream(parts(lengths), args.seq_len))
        filled = [100 * lengths.sum() / (count * args.seq_len) for count in (offline, rows)]
        print(f"{name:48} {filled[0]:8.3f} % {filled[1]:8.3f} % {100 * rows / offline - 100:8.3f} %")


def drawn(count: int, seq_len: int) -> dict[str, NDArray]:
    """By name, lengths that are still to be cut to a row."""
    rng = np.random.default_rng(1)
    short, long = rng.lognormal(4.5, 0.8, count), rng.normal(0.73 * seq_len, 0.24 * seq_len, count)
    return {
        "conversations (log-normal, median 245)": rng.lognormal(5.5, 1.0, count),
        "seven short answers to three long articles": np.where(rng.random(count) < 0.7, short, long),
        "uniform from 1 to a row": rng.integers(1, seq_len + 1, count),
        "mostly longer than half a row": rng.normal(0.59 * seq_len, 0.2 * seq_len, count),
    }


def parts(lengths: NDArray[np.int64]) -> Iterator[Documents]:
    """The documents a hundred at a time, as they come from the tokenizer, with nothing in them."""
    cut = np.array_split(lengths, max(len(lengths) // 100, 1))
    return (Documents(np.zeros(p.sum(), np.int32), np.zeros(p.sum(), np.bool_), p, np.arange(len(p))) for p in cut)


if __name__ == "__main__":
    main()
