"""Cutting rows into train, validation and test so that no question stands on two sides.

Rows that share a question form a group that is never divided. Which groups go where depends on their text and on
`split_seed` only: not on the order of rows or files, nor on anything else in the config.

Shapes: R rows, of which the first M may be cut and the others belong to a split already; G groups.
"""

from __future__ import annotations

import hashlib
import string
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dayzero.data.spill import Spill, first_of_groups
from dayzero.errors import ConfigError
from dayzero.files import canonical_json

TRAIN, VALIDATION, TEST, LEFT_OUT = 0, 1, 2, -1
SPLITS = ("train", "validation", "test")
"""By number."""
NORMALISATION = "Unicode NFKC, case folded, white space collapsed, outer punctuation removed"


def question_key(question: str) -> bytes:
    """16 bytes that are equal for questions that differ only as `NORMALISATION` says."""
    text = " ".join(unicodedata.normalize("NFKC", question).casefold().split())
    text = text.strip(string.punctuation + string.whitespace) or text
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def question_place(question: str, seed: int) -> bytes:
    """16 bytes that are as equal as `question_key` and put the questions into the order of a seed."""
    return hashlib.sha256(f"dayzero split {seed}:".encode() + question_key(question)).digest()[:16]


def exact_key(columns: dict[str, Any]) -> bytes:
    """16 bytes that are equal for rows with exactly the same content."""
    return hashlib.sha256(canonical_json(columns).encode()).digest()[:16]


def num_rows(size: int | float, total: int) -> int:
    """Rows that `size` (an integer, or a share below 1) means of `total`."""
    if isinstance(size, int):
        return size
    return max(1, round(size * total)) if size else 0


@dataclass
class Assigned:
    """What became of the rows and their questions, by split."""

    held_out: Counter[int] = field(default_factory=Counter)
    """Rows left out because a split after theirs has their question."""
    questions: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, np.int64))
    shared: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Questions that two splits still share, counted on the result: none."""
    fewest_rows: int = 0
    """Rows of the training question that has the fewest."""


def assign_splits(
    questions: Spill, split: NDArray[np.int8], cut_rows: int, validation_rows: int, test_rows: int
) -> Assigned:
    """Cut the first `cut_rows` rows into splits, then leave out rows whose question stands in validation or test.

    Test is filled first, with the groups in the order of their place; a group that would overshoot is passed over, so
    the counts are exact whenever enough questions have a single row. Memory does not grow with the rows.

    Args:
        questions: a record (place of the question, row) for each row.
        split: [R] the split that each row has so far, LEFT_OUT for those to be passed over; changed in place.
        cut_rows: M; these are TRAIN or LEFT_OUT.

    Raises ConfigError when nothing is left to train.
    """
    total = sum(int((split[i : min(i + 2**20, cut_rows)] != LEFT_OUT).sum()) for i in range(0, cut_rows, 2**20))
    if validation_rows + test_rows >= max(total, 1) and validation_rows + test_rows > 0:
        raise ConfigError(
            f"data.test_size ({test_rows} rows) + data.validation_size ({validation_rows} rows) leave no training row "
            f"of {total}: lower them or add data"
        )
    left = {TEST: test_rows, VALIDATION: validation_rows}
    result = Assigned()
    for records in questions.buckets():
        records = records[split[records[:, 2]] != LEFT_OUT]
        if not len(records):
            continue
        rows = records[:, 2].astype(np.int64)
        first = first_of_groups(records, 2)
        group = np.cumsum(first) - 1
        sizes = np.bincount(group[rows < cut_rows], minlength=group[-1] + 1)
        given = np.where(sizes > 0, TRAIN, LEFT_OUT)
        for number in (TEST, VALIDATION):
            chosen = _fill(np.where(given == TRAIN, sizes, 0), left[number])
            given[chosen] = number
            left[number] -= int(sizes[chosen].sum())
        now = np.where(rows < cut_rows, given[group], split[rows])
        _keep_apart(now, np.flatnonzero(first), group, result)
        split[rows] = now
        trained = np.bincount(group[now == TRAIN])
        if len(trained := trained[trained > 0]):
            result.fewest_rows = min(result.fewest_rows or int(trained.min()), int(trained.min()))
    return result


def not_cut(name: str, assigned: Assigned, train_rows: int) -> ConfigError:
    """Why a split that was asked for has no row, and what helps: each question has more rows than it was to have."""
    questions, fewest = int(assigned.questions[TRAIN]), assigned.fewest_rows
    without = f"set it to 0, or name a file of its own in data.{name}_source"
    if questions == 1:
        said = f"all {train_rows} rows that are left share one question, which stays in one split: {without}"
    else:
        said = f"each of the {questions} questions has {fewest} rows or more: raise it to {fewest} rows, or {without}"
    return ConfigError(f"data.{name}_size: no {name} row could be cut without sharing a question: {said}")


def _fill(sizes: NDArray[np.int64], wanted: int) -> NDArray[np.int64]:
    """Indices of the groups chosen one after another: each with rows, but no more of them than are still wanted."""
    chosen = []
    waiting = np.flatnonzero(sizes)
    while wanted > 0 and len(waiting := waiting[sizes[waiting] <= wanted]):
        fitting = int(np.searchsorted(np.cumsum(sizes[waiting]), wanted, side="right"))
        chosen.append(waiting[:fitting])
        wanted -= int(sizes[waiting[:fitting]].sum())
        waiting = waiting[fitting:]
    return np.concatenate(chosen) if chosen else np.empty(0, np.int64)


def _keep_apart(now: NDArray[np.int64], starts: NDArray[np.int64], group: NDArray[np.int64], result: Assigned) -> None:
    """Leave out the rows of each group that are not in its last split, in place."""
    last = np.maximum.reduceat(now, starts)
    lost = now < last[group]
    result.held_out.update(now[lost].tolist())
    now[lost] = LEFT_OUT
    bits = np.bitwise_or.reduceat(np.where(now == LEFT_OUT, 0, 1 << np.maximum(now, 0)), starts)
    for number in range(len(SPLITS)):
        result.questions[number] += int(((bits >> number) & 1).sum())
    for pair in ((TEST, TRAIN), (TEST, VALIDATION), (VALIDATION, TRAIN)):
        both = (1 << pair[0]) | (1 << pair[1])
        result.shared[pair] += int((bits & both == both).sum())
