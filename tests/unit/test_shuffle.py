"""The order of rows: every row once, other for each seed and epoch, the same for every way of asking."""

import numpy as np
import pytest
from dayzero.data import shuffle
from dayzero.data.shuffle import Order
from hypothesis import given, settings
from hypothesis import strategies as st


def shuffled(places, num_rows, seed, epoch):
    return Order(num_rows).rows(places, seed, epoch)


@given(st.integers(1, 5000), st.integers(0, 2**32), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_every_row_once_whatever_the_size(num_rows, seed, epoch):
    exact = shuffle.EXACT_ROWS
    places = np.arange(num_rows)
    try:
        for shuffle.EXACT_ROWS in (exact, 0):
            rows = shuffled(places, num_rows, seed, epoch)
            assert np.bincount(rows, minlength=num_rows).tolist() == [1] * num_rows
            some = np.random.default_rng(0).permutation(places)[:7]
            assert shuffled(some, num_rows, seed, epoch).tolist() == rows[some].tolist()
    finally:
        shuffle.EXACT_ROWS = exact


@pytest.mark.parametrize("num_rows", [2**20, 2**20 + 1, 3_000_017])
def test_around_and_beyond_what_is_held_in_memory(num_rows):
    rows = shuffled(np.arange(num_rows), num_rows, seed=1, epoch=0)
    assert (np.bincount(rows, minlength=num_rows) == 1).all()
    # As if drawn: neighbours are far apart, and no share of the places holds more of a share of the rows than chance.
    assert np.abs(np.abs(np.diff(rows)).mean() / num_rows - 1 / 3) < 0.005
    cells = np.histogram2d(np.arange(num_rows), rows, bins=32)[0]
    assert np.abs(cells / (num_rows / 1024) - 1).max() < 6 / np.sqrt(num_rows / 1024)
    other = shuffled(np.arange(num_rows), num_rows, seed=1, epoch=1)
    assert (rows == other).sum() < 20
    assert (rows == shuffled(np.arange(num_rows), num_rows, seed=2, epoch=0)).sum() < 20


def test_a_place_of_a_trillion_rows_needs_no_memory():
    places = np.array([0, 1, 10**12 - 1, 5 * 10**11])
    rows = shuffled(places, 10**12, seed=3, epoch=4)
    assert len(set(rows.tolist())) == 4
    assert ((rows >= 0) & (rows < 10**12)).all()
    assert rows.tolist() == [int(shuffled(places[i : i + 1], 10**12, seed=3, epoch=4)[0]) for i in range(4)]


def test_an_order_is_drawn_once_an_epoch(monkeypatch):
    order, draws, draw = Order(100), [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: draws.append(key) or draw(key))
    found = [order.rows(np.array([place]), 3, epoch)[0] for epoch in (0, 1) for place in range(100)]
    assert draws == [[3, 0], [3, 1]]
    assert found == [*shuffled(np.arange(100), 100, 3, 0), *shuffled(np.arange(100), 100, 3, 1)]
