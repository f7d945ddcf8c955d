"""Packing must lose and double nothing, never overflow, and be the same every time."""

import tracemalloc

import numpy as np
import pytest
from dayzero.data.packing import CARRIED, Documents, best_fit_rows, pack_stream, pack_window
from dayzero.data.tokens import TokenRows, TokenWriter
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


def documents_of(lengths, first=0):
    """Documents whose every token and mask say which document and which place in it they are."""
    lengths = np.asarray(lengths, dtype=np.int64)
    number = np.repeat(first + np.arange(len(lengths)), lengths)
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return Documents(
        (number * SEQ_LEN + place).astype(np.int32), place % 2 == 1, lengths, first + np.arange(len(lengths))
    )


@given(st.lists(st.lists(st.integers(1, SEQ_LEN), max_size=40), max_size=25), st.integers(1, 600))
@settings(max_examples=200, deadline=None)
def test_a_stream_loses_and_doubles_nothing_and_no_row_overflows(parts, window_tokens):
    flat = [n for part in parts for n in part]
    cut = [documents_of(part, sum(map(len, parts[:i]))) for i, part in enumerate(parts)]
    shares = list(pack_stream(cut, SEQ_LEN, window_tokens))
    assert sorted(d for share, _ in shares for d in share.document_ids.tolist()) == list(range(len(flat)))
    for share, counts in shares:
        assert share.lengths.tolist() == [flat[d] for d in share.document_ids]
        assert counts.min() >= 1
        assert counts.sum() == len(share.lengths)
        fill = np.add.reduceat(share.lengths, np.cumsum(counts) - counts)
        assert fill.max() <= SEQ_LEN
        expected = np.concatenate([d * SEQ_LEN + np.arange(flat[d]) for d in share.document_ids])
        assert share.input_ids.tolist() == expected.tolist()
        assert share.loss_mask.tolist() == (expected % SEQ_LEN % 2 == 1).tolist()
    again = list(pack_stream(cut, SEQ_LEN, window_tokens))
    assert [s.document_ids.tolist() for s, _ in again] == [s.document_ids.tolist() for s, _ in shares]
    assert [c.tolist() for _, c in again] == [c.tolist() for _, c in shares]


@given(st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=300))
@settings(max_examples=100, deadline=None)
def test_what_fits_into_one_window_is_packed_as_a_whole(lengths):
    [(share, counts)] = pack_stream([documents_of(lengths)], SEQ_LEN, window_tokens=SEQ_LEN * len(lengths) + 1)
    order, offline = best_fit_rows(np.array(lengths), SEQ_LEN)
    assert share.document_ids.tolist() == order.tolist()
    assert counts.tolist() == offline.tolist()


@given(st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=300))
@settings(max_examples=100, deadline=None)
def test_a_window_keeps_back_at_most_a_quarter_and_no_full_row(lengths):
    lengths = np.array(lengths)
    order, _, carried = pack_window(lengths, SEQ_LEN)
    assert sorted([*order, *carried]) == list(range(len(lengths)))
    assert lengths[carried].sum() <= lengths.sum() / CARRIED
    assert len(carried) <= len(lengths) / CARRIED
    assert (lengths[carried] < SEQ_LEN).all()


def mixed(kind, rng, count):
    match kind:
        case "conversations":  # most are short, some reach the row's length
            return rng.lognormal(5.5, 1.0, count)
        case "sources":  # short answers and long articles
            return np.where(rng.random(count) < 0.7, rng.lognormal(4.5, 0.8, count), rng.normal(1500, 500, count))
        case "any":
            return rng.integers(1, 2049, count // 2)
        case "long":  # few have a partner: no packing can fill the rows
            return rng.normal(1200, 400, count // 2)
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("kind", "efficiency"), [("conversations", 0.99), ("sources", 0.99), ("any", 0.99), ("long", 0.8)]
)
def test_one_pass_is_within_half_a_percent_of_the_offline_packing(kind, efficiency):
    seq_len = 2048
    rng = np.random.default_rng(1)
    lengths = np.clip(mixed(kind, rng, 100_000).astype(np.int64), 1, seq_len)
    parts = (
        Documents(np.zeros(part.sum(), np.int32), np.zeros(part.sum(), np.bool_), part, np.arange(len(part)))
        for part in np.array_split(lengths, 1000)
    )
    rows = sum(len(counts) for _, counts in pack_stream(parts, seq_len))
    offline = len(best_fit_rows(lengths, seq_len)[1])
    assert rows <= 1.005 * offline
    assert lengths.sum() / (rows * seq_len) >= efficiency


def test_memory_does_not_grow_with_the_documents(tmp_path):
    def peak(parts):
        lengths = np.random.default_rng(0).integers(1, SEQ_LEN, 500)
        tracemalloc.start()
        with TokenWriter(tmp_path / str(parts)) as writer:
            stream = (documents_of(lengths, i * 500) for i in range(parts))
            for share, counts in pack_stream(stream, SEQ_LEN, window_tokens=100_000):
                writer.append(share.input_ids, share.loss_mask, share.lengths, counts, share.document_ids)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rows = TokenRows(tmp_path / str(parts), seq_len=SEQ_LEN)
        assert sorted(rows.source_rows(np.arange(len(rows)))) == list(range(parts * 500))
        return most

    assert peak(200) < 1.1 * peak(50)
