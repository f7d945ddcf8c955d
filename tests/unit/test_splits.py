"""Splits: groups stay whole, sizes are exact, and nothing but the text and the seed decides."""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from dayzero.data import spill
from dayzero.data.spill import Spill
from dayzero.data.splits import (
    LEFT_OUT,
    TEST,
    TRAIN,
    VALIDATION,
    Assigned,
    assign_splits,
    num_rows,
    question_key,
    question_place,
)
from dayzero.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st

QUESTIONS = st.lists(st.sampled_from([f"q{i}" for i in range(60)]), min_size=20, max_size=120)


def assign(
    questions: list[str], validation: int, test: int, seed: int, given: Sequence[Sequence[str]] = ()
) -> tuple[np.ndarray, Assigned]:
    """The split of each row: of `questions`, which may be cut, then of given validation and test rows."""
    rows = [*questions, *(q for part in given for q in part)]
    split = np.repeat([TRAIN, VALIDATION, TEST][: 1 + len(given)], [len(questions), *map(len, given)]).astype(np.int8)
    with tempfile.TemporaryDirectory() as folder, Spill(Path(folder) / "spill", 3) as places:
        for row, question in enumerate(rows):
            places.add(question_place(question, seed), row)
        found = assign_splits(places, split, len(questions), validation, test)
    return split, found


def plainly(questions: list[str], validation: int, test: int, seed: int, given: Sequence[Sequence[str]]) -> list[int]:
    """The same in plain Python, in memory."""
    sizes = Counter(map(question_key, questions))
    salt = f"dayzero split {seed}:".encode()
    chosen: dict[bytes, int] = {}
    for split, wanted in ((TEST, test), (VALIDATION, validation)):
        for key in sorted(sizes, key=lambda key: hashlib.sha256(salt + key).digest()):
            if key not in chosen and sizes[key] <= wanted:
                chosen[key] = split
                wanted -= sizes[key]
    rows = [(q, chosen.get(question_key(q), TRAIN)) for q in questions]
    rows += [(q, split) for split, part in zip((VALIDATION, TEST), given, strict=False) for q in part]
    last = {key: max(s for q, s in rows if question_key(q) == key) for key in {question_key(q) for q, _ in rows}}
    return [s if s == last[question_key(q)] else LEFT_OUT for q, s in rows]


@given(QUESTIONS, st.integers(0, 9), st.integers(0, 9), st.integers(0, 5), st.lists(QUESTIONS, max_size=2))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_no_question_stands_on_two_sides(
    questions: list[str], validation: int, test: int, seed: int, more: list[list[str]]
) -> None:
    given = [part[:5] for part in more]
    split, found = assign(questions, validation, test, seed, given)
    assert split.tolist() == plainly(questions, validation, test, seed, given)
    rows = [*questions, *(q for part in given for q in part)]
    sides = [{question_key(q) for q, s in zip(rows, split, strict=True) if s == side} for side in range(3)]
    assert not sides[TRAIN] & sides[TEST]
    assert not sides[VALIDATION] & sides[TEST]
    assert not sides[TRAIN] & sides[VALIDATION]
    assert not any(found.shared.values())
    assert found.questions.tolist() == list(map(len, sides))
    assert found.held_out.total() == np.sum(split == LEFT_OUT)
    cut = split[: len(questions)]
    assert np.sum(cut == TEST) <= test
    assert np.sum(cut == VALIDATION) <= validation


def test_more_rows_than_memory_is_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [f"question {i % 900}" for i in range(1000)]
    expected, _ = assign(questions, 100, 200, 1)
    monkeypatch.setattr(spill, "HELD_BYTES", 2000)
    assert assign(questions, 100, 200, 1)[0].tolist() == expected.tolist() == plainly(questions, 100, 200, 1, [])


def test_sizes_are_exact_where_single_questions_allow_it() -> None:
    questions = [f"question {i % 90}" for i in range(100)]  # ten questions come twice
    for seed in range(5):
        split, _ = assign(questions, 10, 21, seed)
        assert [int(np.sum(split == s)) for s in (TRAIN, VALIDATION, TEST)] == [69, 10, 21]


def test_the_fewest_rows_of_a_training_question_are_known() -> None:
    questions = [f"q{i}" for i in range(3) for _ in range(10 + i)]
    for validation, fewest in ((0, 10), (9, 10), (10, 11)):
        split, found = assign(questions, validation, 0, 0)
        sizes = Counter(q for q, s in zip(questions, split, strict=True) if s == TRAIN)
        assert found.fewest_rows == fewest == min(sizes.values())


def test_the_order_of_rows_does_not_matter_but_the_seed_does() -> None:
    questions = [f"question {i}" for i in range(200)]
    shuffled = random.Random(0).sample(questions, len(questions))
    first, again, other = (
        dict(zip(rows, assign(rows, 10, 20, seed)[0].tolist(), strict=True))
        for rows, seed in ((questions, 0), (shuffled, 0), (questions, 1))
    )
    assert first == again
    assert first != other


def test_a_known_split_never_changes() -> None:
    """Anyone's test rows would change with this function: raise store.FORMAT then."""
    split, _ = assign([f"question {i}" for i in range(30)], 3, 4, 0)
    assert (np.flatnonzero(split == TEST).tolist(), np.flatnonzero(split == VALIDATION).tolist()) == KNOWN


KNOWN = ([1, 17, 25, 29], [2, 7, 8])


def test_normalisation_of_questions() -> None:
    same = ["What is  2+2?", "what is 2+2", " WHAT\nIS 2+2 ?", "What is 2+2"]
    assert len({question_key(q) for q in same}) == 1
    assert question_key("what is 2-2") != question_key("what is 2+2")
    assert question_key("???") != question_key("!!!"), "a question of punctuation only is compared as it is"


def test_sizes() -> None:
    assert num_rows(12, 100) == 12
    assert num_rows(0.05, 100) == 5
    assert num_rows(0.001, 100) == 1
    assert num_rows(0.0, 100) == 0
    with pytest.raises(ConfigError, match=r"test_size \(8 rows\) \+ data\.validation_size \(2 rows\).*of 10: lower"):
        assign([str(i) for i in range(10)], 2, 8, 0)
