"""Words and n-grams of texts as 64-bit hashes, a whole batch of texts at a time.

Words are what is left of a text in compatibility form (NFKC) and lower case between anything that is no letter, mark or
digit; a character of a script that writes no spaces is a word. Equal words have equal hashes in every process.

Shapes: S texts, C bytes of all of them, W words, G n-grams.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dayzero.data.hashing import mixed

_NO_SPACES = r"([\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])"
_NO_WORD = r"[^\p{L}\p{M}\p{N}]+"
_SPACE = 0x20
# Odd, so that they have inverses modulo 2^64.
_BYTE_BASE = np.uint64(0x9E3779B97F4A7C15)
_WORD_BASE = np.uint64(0xD1342543DE82EF95)
_BYTE_INVERSE = np.uint64(pow(int(_BYTE_BASE), -1, 2**64))


@dataclass(frozen=True)
class Words:
    """The words of some texts, one after another."""

    hashes: NDArray[np.uint64]
    """[W]"""
    text: NDArray[np.int64]
    """[W] the text that each stands in, ascending."""

    def ngrams(self, n: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Hashes of all runs of n words within a text, and their texts, [G] each."""
        count = max(len(self.hashes) - n + 1, 0)
        grams = np.zeros(count, np.uint64)
        for i in range(n):
            grams = grams * _WORD_BASE + self.hashes[i : i + count]
        inside = self.text[:count] == self.text[n - 1 : n - 1 + count]
        return mixed(grams[inside]), self.text[:count][inside]


def words(texts: pa.Array) -> Words:
    """The words of an array of strings; a null has none."""
    plain = pc.utf8_lower(pc.utf8_normalize(texts.cast(pa.large_string()), "NFKC"))
    plain = pc.replace_substring_regex(plain, _NO_SPACES, r" \1 ")
    plain = pc.replace_substring_regex(plain, _NO_WORD, " ")
    lengths = pc.fill_null(pc.binary_length(plain), 0).to_numpy(zero_copy_only=False)
    # Joined with a space after each text, so that no word reaches over a text's end.
    data = np.frombuffer(("\x20".join(t or "" for t in plain.to_pylist()) + "\x20").encode(), np.uint8)
    letter = data != _SPACE
    edges = np.flatnonzero(np.diff(letter, prepend=False, append=False))
    starts, ends = edges[::2], edges[1::2]
    # A word is the number whose digits are its bytes: a difference of two prefix sums, moved to the word's start.
    powers, back = _powers(1 << len(data).bit_length())
    sums = np.concatenate([[np.uint64(0)], np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers[: len(data)])])
    hashes = mixed((sums[ends] - sums[starts]) * back[starts])
    text_ends = np.cumsum(lengths + 1)
    return Words(hashes, np.searchsorted(text_ends, starts, side="right"))


@lru_cache(maxsize=1)
def _powers(count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The powers of the byte base from 0 on, and their inverses."""
    one = np.ones(1, np.uint64)
    bases = (np.full(count - 1, base) for base in (_BYTE_BASE, _BYTE_INVERSE))
    up, down = (np.cumprod(np.concatenate([one, base]), dtype=np.uint64) for base in bases)
    return up, down
