"""Cutting rows into train, validation and test so that no question stands on two sides.

Rows that share a question form a group that is never divided. Which groups go where depends on their text and on
`split_seed` only: not on the order of rows or files, nor on anything else in the config.
"""

from __future__ import annotations

import hashlib
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from dayzero.errors import ConfigError
from dayzero.files import canonical_json

TRAIN, VALIDATION, TEST = 0, 1, 2
NORMALISATION = "Unicode NFKC, case folded, white space collapsed, outer punctuation removed"


def question_key(question: str) -> bytes:
    """16 bytes that are equal for questions that differ only as `NORMALISATION` says."""
    text = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    text = text.strip(string.punctuation + string.whitespace) or text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def num_rows(size: int | float, total: int, key: str) -> int:
    """Rows that `size` (an integer, or a share below 1) means of `total`; raises ConfigError for a wrong share."""
    if isinstance(size, int):
        return size
    if not 0 <= size < 1:
        raise ConfigError(f"{key} = {size}: give rows as an integer, or a share from 0 to below 1")
    return max(1, round(size * total)) if size else 0


def assign_splits(keys: Sequence[bytes], validation_rows: int, test_rows: int, seed: int) -> np.ndarray:
    """The split (TRAIN, VALIDATION or TEST) of each row, int8 [R], given each row's question key.

    Test is filled first, with the groups in the order of a seeded hash; a group that would overshoot is passed over, so
    the counts are exact whenever enough questions have a single row. Raises ConfigError when nothing is left to train.
    """
    if validation_rows + test_rows >= max(len(keys), 1) and validation_rows + test_rows > 0:
        raise ConfigError(
            f"data.test_size ({test_rows} rows) + data.validation_size ({validation_rows} rows) leave no training row "
            f"of {len(keys)}: lower them or add data"
        )
    sizes = Counter(keys)
    salt = f"dayzero split {seed}:".encode()
    order = sorted(sizes, key=lambda key: hashlib.sha256(salt + key).digest())
    split_of: dict[bytes, int] = {}
    for split, wanted in ((TEST, test_rows), (VALIDATION, validation_rows)):
        for key in order:
            if wanted <= 0:
                break
            if key not in split_of and sizes[key] <= wanted:
                split_of[key] = split
                wanted -= sizes[key]
    return np.array([split_of.get(key, TRAIN) for key in keys], dtype=np.int8)


def overlap(a: set[bytes], b: set[bytes]) -> int:
    """Number of questions in both."""
    return len(a & b)


def exact_key(columns: dict[str, Any]) -> bytes:
    """16 bytes that are equal for rows with exactly the same content."""
    return hashlib.sha256(canonical_json(columns).encode()).digest()[:16]
