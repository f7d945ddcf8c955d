"""The loader must neither lose nor double a row, whatever the ranks, workers and interruptions."""

import pickle
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress

import numpy as np
import psutil
import pytest
import torch
from dayzero.data import loader
from dayzero.data.loader import TrainBatches, ValidationBatches, steps_of
from dayzero.data.tokens import FILL, IGNORE, TokenRows
from dayzero.errors import ConfigError, DataError

from tests.token_store import num_documents, num_label_tokens, write_token_store

SEQ_LEN = 24


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """37 rows of one to three documents; token ids tell the document, the first token of each is never supervised."""
    rng = np.random.default_rng(0)
    documents, rows = [], []
    for _ in range(37):
        row = []
        for _ in range(rng.integers(1, 4)):
            length = int(rng.integers(1, SEQ_LEN // 3 + 1))
            row.append(len(documents))
            ids = 1000 * len(documents) + np.arange(1, length + 1)
            documents.append((ids.tolist(), (rng.random(length) < 0.6).tolist()))
        rows.append(row)
    path = tmp_path_factory.mktemp("tokens") / "train"
    write_token_store(path, documents, rows)
    return path


def batches(store, **options):
    defaults = {"global_batch_size": 8, "local_batch_size": 2, "max_steps": 12, "seed": 3}
    return TrainBatches(TokenRows(store), **{**defaults, **options})


def all_ranks(store, dp_size, **options):
    """For each step, the batches of all ranks."""
    return list(zip(*[batches(store, dp_rank=r, dp_size=dp_size, **options) for r in range(dp_size)], strict=True))


def sequences(rank_batches):
    """Supervision as a multiset, independent of dealing and padding: (input, label, position) of every label."""
    found = Counter()
    for batch in rank_batches:
        for m in batch.micro_batches:
            where = m["labels"] != IGNORE
            found.update(
                zip(
                    m["input_ids"][where].tolist(),
                    m["labels"][where].tolist(),
                    m["position_ids"][where].tolist(),
                    strict=True,
                )
            )
    return found


def same(a, b):
    assert (a.step, a.epoch, a.row_ids, a.num_tokens, a.num_label_tokens) == (
        b.step,
        b.epoch,
        b.row_ids,
        b.num_tokens,
        b.num_label_tokens,
    )
    assert len(a.micro_batches) == len(b.micro_batches)
    for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[name], y[name]) for name in x)


def test_a_row_is_its_documents_one_after_another_and_labels_stay_inside_them(tmp_path):
    write_token_store(
        tmp_path,
        [([5, 6, 7], [True, True, True]), ([8, 9], [False, True]), ([4], [True])],
        rows=[[1], [0, 2]],
    )
    rows = TokenRows(tmp_path, seq_len=4)
    assert rows.lengths_of([0, 1]).tolist() == [2, 4]
    row = rows.row(1)
    assert row.input_ids.tolist() == [5, 6, 7, 4]
    assert row.labels.tolist() == [6, 7, IGNORE, IGNORE]
    assert row.position_ids.tolist() == [0, 1, 2, 0]
    assert row.document_ids.tolist() == [0, 2]
    assert row.cu_seqlens.tolist() == [0, 3, 4]
    assert rows.lengths_of([1, FILL, 0]).tolist() == [4, 0, 2]
    assert rows.longest() == 4
    assert num_label_tokens(rows) == [1, 2]
    assert rows.source_rows([1, 0]) == [0, 2, 1]
    unpacked = TokenRows(tmp_path, packed=False)
    assert [unpacked.row(i).input_ids.tolist() for i in range(3)] == [[8, 9], [5, 6, 7], [4]]
    assert len(pickle.dumps(rows)) < 1000, "workers must open the maps themselves"


def test_a_store_that_cannot_be_right_is_refused(tmp_path):
    write_token_store(tmp_path, [([5, 6, 7], [True] * 3)], rows=[[0]])
    with pytest.raises(DataError, match=r"3 tokens, more than tokenize\.seq_len 2: tokenize again"):
        TokenRows(tmp_path, seq_len=2)
    np.save(tmp_path / "input_ids.npy", np.array([5, 6], dtype=np.int32))
    with pytest.raises(DataError, match="do not belong together"):
        TokenRows(tmp_path)
    (tmp_path / "loss_mask.npy").unlink()
    with pytest.raises(DataError, match=r"loss_mask\.npy"):
        TokenRows(tmp_path)


@pytest.mark.parametrize(("dp_size", "local_batch_size"), [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2)])
def test_every_row_once_an_epoch_whatever_the_ranks(store, dp_size, local_batch_size):
    steps = all_ranks(store, dp_size, local_batch_size=local_batch_size, max_steps=None, num_epochs=2)
    rows = TokenRows(store)
    assert len(steps) == steps_of(37, 8, max_steps=None, num_epochs=2) == 10
    assert {len(b.micro_batches) for step in steps for b in step} == {8 // local_batch_size // dp_size}
    assert {m["labels"].shape[0] for step in steps for b in step for m in b.micro_batches} == {local_batch_size}
    assert Counter(d for step in steps for d in step[0].row_ids) == {d: 2 for d in range(num_documents(rows))}
    assert sum(b.num_tokens for step in steps for b in step) == 2 * rows.num_tokens
    expected = Counter()
    for i in range(37):
        row = rows.row(i)
        where = row.labels != IGNORE
        for triple in zip(*(a[where].tolist() for a in (row.input_ids, row.labels, row.position_ids)), strict=True):
            expected[triple] += 2
    found = sum((sequences(step) for step in steps), Counter())
    assert found == expected
    assert sum(b.num_label_tokens for step in steps for b in step) == sum(expected.values())
    assert steps[-1][0].epoch == 2


@pytest.mark.parametrize(("dp_size", "local_batch_size"), [(1, 1), (2, 4), (4, 2)])
def test_a_global_batch_is_the_same_whatever_the_ranks(store, dp_size, local_batch_size):
    reference = all_ranks(store, 1, local_batch_size=8)
    for one, many in zip(reference, all_ranks(store, dp_size, local_batch_size=local_batch_size), strict=True):
        assert sequences(one) == sequences(many)
        assert all(b.row_ids == one[0].row_ids for b in many)


def test_batches_run_on_into_the_next_epoch(store):
    b = batches(store)
    seen = np.concatenate([b.global_batch(s) for s in range(12)])
    assert sorted(seen[:37]) == sorted(seen[37:74]) == list(range(37))
    assert seen[:37].tolist() != seen[37:74].tolist(), "each epoch has its own order"
    other = batches(store, seed=4)
    assert b.global_batch(0).tolist() != other.global_batch(0).tolist(), "each seed has its own order"
    assert list(b)[4].epoch == pytest.approx(40 / 37)


def test_resumed_equals_uninterrupted_and_workers_change_nothing(store):
    whole = list(batches(store))
    resumed = list(batches(store, start_step=7))
    assert [b.step for b in resumed] == list(range(7, 12))
    for a, b in zip(whole[7:], resumed, strict=True):
        same(a, b)
    state = torch.get_rng_state()
    for a, b in zip(whole[3:], batches(store, start_step=3, num_workers=2), strict=True):
        same(a, b)
    assert torch.equal(torch.get_rng_state(), state), "loading must not move the global random state"


@pytest.mark.parametrize("workers", [1, 2])
def test_many_messages_of_workers_do_not_write_over_each_other(store, workers, monkeypatch):
    monkeypatch.setattr(loader, "MESSAGE_TOKENS", 1)  # a message for each step, through few slots
    reference = list(batches(store, max_steps=40))
    kept = list(batches(store, max_steps=40, num_workers=workers))
    for a, b in zip(reference, kept, strict=True):
        same(a, b)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_to_stop_that_reaches_the_workers_too_changes_nothing(store, number, monkeypatch):
    """SLURM signals every process of a job: it is the rank that stops, and it needs its workers until then."""
    monkeypatch.setattr(loader, "MESSAGE_TOKENS", 1)
    reference, found = list(batches(store, max_steps=40)), []
    before = {process.pid for process in psutil.Process().children()}
    for batch in batches(store, max_steps=40, num_workers=2):
        found.append(batch)
        if len(found) == 2:
            workers = [p for p in psutil.Process().children() if p.pid not in before]
            assert len(workers) == 2
            for worker in workers:  # from another process: torch's own handler knows its parent
                subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
            assert psutil.wait_procs(workers, timeout=1)[0] == []
    for a, b in zip(reference, found, strict=True):
        same(a, b)
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set(), "this process itself hears everything again"


def test_workers_end_with_their_rank(store):
    code = f"""import psutil, time
from dayzero.data.loader import TrainBatches
from dayzero.data.tokens import TokenRows
rows = TrainBatches(TokenRows({str(store)!r}), global_batch_size=2, local_batch_size=2, max_steps=10**6, num_workers=2)
iterator = iter(rows)
next(iterator)
print(*(p.pid for p in psutil.Process().children()), flush=True)
time.sleep(600)"""
    rank = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
    rank.kill()
    rank.communicate()
    left = psutil.wait_procs(workers, timeout=60)[1]
    for worker in left:
        with suppress(psutil.NoSuchProcess):
            worker.kill()
    assert (len(workers), left) == (2, [])


@pytest.mark.parametrize("stops", [[3], [1, 4, 6]])
def test_an_epoch_goes_on_exactly_on_other_ranks_and_workers(store, stops):
    """Interrupted and continued with another world size, local batch and workers each time: the same global order."""
    settings = [(1, 8, 0), (4, 2, 1), (2, 1, 0), (8, 1, 0)]
    reference = [batches(store).global_batch(step) for step in range(12)]
    seen = []
    start = 0
    for (dp_size, local_batch_size, workers), stop in zip(settings, [*stops, 12], strict=False):
        ranks = [
            batches(
                store,
                dp_rank=rank,
                dp_size=dp_size,
                local_batch_size=local_batch_size,
                start_step=start,
                num_workers=workers if rank == 0 else 0,
            )
            for rank in range(dp_size)
        ]
        assert ranks[0].global_batch(start).tolist() == reference[start].tolist()
        for step, share in zip(range(start, stop), zip(*ranks, strict=True), strict=False):
            assert all(batch.step == step for batch in share)
            found = Counter(int(i) for b in share for m in b.micro_batches for i in m["input_ids"].flatten() if i)
            rows = TokenRows(store)
            expected = Counter(int(i) for r in reference[step] for i in rows.row(int(r)).input_ids)
            assert found == expected, "all tokens of the step's rows, each as often as there"
            seen += reference[step].tolist()
        start = stop
    assert Counter(seen[:37]) == Counter(seen[37:74]) == Counter(range(37))


def test_padding_is_masked_and_continues_positions(store):
    padded = real = 0
    for batch in batches(store):
        for m in batch.micro_batches:
            assert m["input_ids"].dtype == m["labels"].dtype == m["position_ids"].dtype == torch.int64
            assert m["input_ids"].shape[1] == m["lengths"].max()
            for ids, labels, positions in zip(m["input_ids"], m["labels"], m["position_ids"], strict=True):
                length = int((ids != 0).sum())
                assert (ids[length:] == 0).all()
                assert (labels[length:] == IGNORE).all()
                after = int(positions[length - 1]) + 1
                assert positions[length:].tolist() == list(range(after, after + len(ids) - length))
                padded, real = padded + len(ids), real + length
        assert batch.num_tokens == sum(int((m["input_ids"] != 0).sum()) for m in batch.micro_batches)
    assert real / padded > 0.75, "rows of like length share a micro-batch"


def test_short_last_batch_is_filled_with_rows_that_count_nothing(store):
    last = [list(batches(store, dp_rank=r, dp_size=4, max_steps=None, num_epochs=1))[-1] for r in range(4)]
    assert last[0].step == 4
    assert sum(b.num_tokens for b in last) == TokenRows(store).lengths_of(batches(store).global_batch(4)[:5]).sum()
    assert last[3].num_label_tokens == 0, "37 = 4 * 8 + 5 rows: nothing is left for the last rank"
    assert all((m["labels"] == IGNORE).all() for m in last[3].micro_batches)
    assert {len(b.micro_batches) for b in last} == {1}


def test_part_of_an_epoch(store):
    assert steps_of(37, 8, max_steps=None, num_epochs=0.5) == 3  # 18 rows
    half = [d for b in batches(store, max_steps=None, num_epochs=0.5) for d in b.row_ids]
    assert len(half) == len(set(half))
    with pytest.raises(ConfigError, match="exactly one"):
        steps_of(37, 8, max_steps=None, num_epochs=None)


def test_validation_sees_every_row_once_in_order(store):
    rows = TokenRows(store)
    for dp_size, workers in ((1, 0), (2, 1), (4, 0)):
        ranks = [
            list(ValidationBatches(rows, local_batch_size=3, dp_rank=r, dp_size=dp_size, num_workers=workers))
            for r in range(dp_size)
        ]
        assert {len(r) for r in ranks} == {-(-37 // (3 * dp_size))}
        assert [d for b in ranks[0] for d in b.row_ids] == list(range(num_documents(rows)))
        assert sum(b.num_tokens for r in ranks for b in r) == rows.num_tokens
        labels = sum(b.num_label_tokens for r in ranks for b in r)
        assert labels == sum(num_label_tokens(rows)) > 0


def test_more_ranks_than_rows(tmp_path):
    write_token_store(tmp_path, [([5, 6], [True, True])] * 3, rows=[[0], [1], [2]])
    with pytest.raises(ConfigError, match=r"4 data-parallel ranks for only 3 row\(s\)"):
        TrainBatches(TokenRows(tmp_path), global_batch_size=4, local_batch_size=1, dp_size=4, max_steps=1)
