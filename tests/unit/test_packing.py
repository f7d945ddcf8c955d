"""Packing must lose and double nothing, never overflow, and be the same every time."""

import numpy as np
from dayzero.data.packing import best_fit_rows
from hypothesis import given, settings
from hypothesis import strategies as st

SEQ_LEN = 50


def rows_of(lengths, seq_len=SEQ_LEN):
    order, counts = best_fit_rows(np.array(lengths, dtype=np.int64), seq_len)
    return [part.tolist() for part in np.split(order, np.cumsum(counts)[:-1])] if len(counts) else []


@given(st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=200))
@settings(max_examples=200, deadline=None)
def test_every_document_once_no_row_overflows_and_few_rows(lengths):
    rows = rows_of(lengths)
    assert sorted(d for row in rows for d in row) == list(range(len(lengths)))
    fill = [sum(lengths[d] for d in row) for row in rows]
    assert min(fill) > 0
    assert max(fill) <= SEQ_LEN
    # Best fit never leaves two rows that fit into one, and stays within 11/9 of the fewest rows + 6/9.
    assert len(rows) < 2 or sum(sorted(fill)[:2]) > SEQ_LEN
    assert len(rows) <= 11 / 9 * np.ceil(sum(lengths) / SEQ_LEN) + 6 / 9 or any(n > SEQ_LEN / 3 for n in lengths)
    assert rows == rows_of(lengths)


def test_rows_and_documents_keep_the_order_of_the_source():
    assert rows_of([30, 50, 20, 10, 40]) == [[0, 2], [1], [3, 4]]


def test_the_tightest_row_is_chosen():
    # Left after the long ones: 12 and 10; a document of 10 must go where 10 are left.
    assert rows_of([38, 40, 10, 12]) == [[0, 3], [1, 2]]


def test_nothing_and_one():
    order, counts = best_fit_rows(np.array([], dtype=np.int64), SEQ_LEN)
    assert len(order) == len(counts) == 0
    assert rows_of([SEQ_LEN]) == [[0]]


def test_many_documents_pack_nearly_full():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 100_000).astype(np.int64) + 1, 2048)
    order, counts = best_fit_rows(lengths, 2048)
    assert sorted(order) == list(range(100_000))
    assert lengths.sum() / (len(counts) * 2048) > 0.999
