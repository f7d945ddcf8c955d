"""Splits: groups stay whole, sizes are exact, and nothing but the text and the seed decides."""

from __future__ import annotations

import random

import numpy as np
import pytest
from dayzero.data.splits import TEST, TRAIN, VALIDATION, assign_splits, num_rows, overlap, question_key
from dayzero.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st

QUESTIONS = st.lists(st.sampled_from([f"q{i}" for i in range(60)]), min_size=20, max_size=120)


@given(QUESTIONS, st.integers(0, 6), st.integers(0, 6), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_no_question_stands_on_two_sides(questions: list[str], validation: int, test: int, seed: int) -> None:
    keys = [question_key(q) for q in questions]
    split = assign_splits(keys, validation, test, seed)
    sides = {s: {k for k, t in zip(keys, split, strict=True) if t == s} for s in (TRAIN, VALIDATION, TEST)}
    assert overlap(sides[TRAIN], sides[TEST]) == overlap(sides[VALIDATION], sides[TEST]) == 0
    assert overlap(sides[TRAIN], sides[VALIDATION]) == 0
    assert np.sum(split == TEST) <= test
    assert np.sum(split == VALIDATION) <= validation
    assert np.sum(split == TRAIN) > 0


def test_sizes_are_exact_where_single_questions_allow_it() -> None:
    keys = [question_key(f"question {i % 90}") for i in range(100)]  # ten questions come twice
    for seed in range(5):
        split = assign_splits(keys, 10, 21, seed)
        assert [int(np.sum(split == s)) for s in (TRAIN, VALIDATION, TEST)] == [69, 10, 21]


def test_the_order_of_rows_does_not_matter_but_the_seed_does() -> None:
    keys = [question_key(f"question {i}") for i in range(200)]
    shuffled = random.Random(0).sample(keys, len(keys))
    first, again = assign_splits(keys, 10, 20, 0), assign_splits(shuffled, 10, 20, 0)
    assert dict(zip(keys, first, strict=True)) == dict(zip(shuffled, again, strict=True))
    assert dict(zip(keys, first, strict=True)) != dict(zip(keys, assign_splits(keys, 10, 20, 1), strict=True))


def test_a_known_split_never_changes() -> None:
    """Anyone's test rows would change with this function: raise store.FORMAT then."""
    split = assign_splits([question_key(f"question {i}") for i in range(30)], 3, 4, 0)
    assert (np.flatnonzero(split == TEST).tolist(), np.flatnonzero(split == VALIDATION).tolist()) == KNOWN


KNOWN = ([1, 17, 25, 29], [2, 7, 8])


def test_normalisation_of_questions() -> None:
    same = ["What is  2+2?", "what is 2+2", " WHAT\nIS 2+2 ?", "What is 2+2"]
    assert len({question_key(q) for q in same}) == 1
    assert question_key("what is 2-2") != question_key("what is 2+2")
    assert question_key("???") != question_key("!!!"), "a question of punctuation only is compared as it is"


def test_sizes() -> None:
    assert num_rows(12, 100, "data.test_size") == 12
    assert num_rows(0.05, 100, "data.test_size") == 5
    assert num_rows(0.001, 100, "data.test_size") == 1
    assert num_rows(0.0, 100, "data.test_size") == 0
    with pytest.raises(ConfigError, match=r"data\.test_size = 1\.5: give rows as an integer"):
        num_rows(1.5, 100, "data.test_size")
    with pytest.raises(ConfigError, match=r"test_size \(8 rows\) \+ data\.validation_size \(2 rows\).*of 10: lower"):
        assign_splits([question_key(str(i)) for i in range(10)], 2, 8, 0)
