"""The lock of a run: held, released, refused with its holder's name, and taken over when the holder is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from dayzero import attempts, run_lock, slurm
from dayzero.attempts import Attempts, recorded
from dayzero.console import log
from dayzero.errors import DataError
from dayzero.files import read_json_lines
from dayzero.interruption import EXIT_INTERRUPTED, MAX_WITHOUT_A_STEP, stop_or_go_on, stopped_in_time
from dayzero.run_lock import LOCK, RunHeld, RunLock, read_lock
from dayzero.slurm import Job

FAST = {"beat": 0.05, "stale_after": 0.5}
HELD = {"beat": 0.05, "stale_after": 60}
"""Not to be taken over, even where a busy machine lets a sign of life wait."""


@pytest.fixture(autouse=True)
def stops() -> Iterator[list[int]]:
    """The requests to stop that this process has sent itself, for the test to look at; no other may be left."""
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    yield asked
    signal.signal(signal.SIGTERM, before)
    assert not asked


def foreign(folder: Path, **values: object) -> Path:
    """A lock of a process on another host."""
    holder = {"token": "theirs", "host": "elsewhere", "pid": 7, "process_started": 0.0, "job_id": None, "restarts": 0}
    path = folder / LOCK
    path.write_text(json.dumps({**holder, "nodes": None, "since": "2026-01-01T00:00:00+00:00", **values}))
    return path


def test_it_is_there_inside_the_block_only(tmp_path: Path) -> None:
    with RunLock(tmp_path / "train", job=None):
        holder = read_lock(tmp_path / "train")
        assert holder
        assert holder["pid"] == os.getpid()
    assert list((tmp_path / "train").iterdir()) == []


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    with RunLock(tmp_path, job=None, **HELD), pytest.raises(RunHeld), RunLock(tmp_path, job=None, **HELD):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_spoilt_lock_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with pytest.raises(ValueError, match=r"lock\.json is spoilt: delete it"), RunLock(tmp_path, job=None, **FAST):
        pass


def test_a_lock_that_another_takes_while_it_is_thought_about_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(tmp_path)
    os.utime(tmp_path / LOCK, (0, 0))

    def look(self: RunLock, holder: dict[str, Any]) -> str:
        if holder["token"] == "another":
            raise RunHeld
        foreign(tmp_path, token="another")
        return "silent"

    monkeypatch.setattr(RunLock, "_wait_for_a_sign", look)
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("a living lock is put aside"))
    with pytest.raises(RunHeld), RunLock(tmp_path, job=None, **FAST):
        pass
    assert read_lock(tmp_path)["token"] == "another"  # type: ignore[index]


def test_a_living_process_of_this_host_is_named(tmp_path: Path) -> None:
    named = pytest.raises(RunHeld, match=rf"process {os.getpid()} of .*\(kill")
    with RunLock(tmp_path, job=None, **HELD), named, RunLock(tmp_path, job=None, **HELD):
        pass


def test_who_has_lost_the_lock_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: list[int]) -> None:
    """But not when it is away for a moment only: with whoever took another's for stale, and looks again."""
    aside = tmp_path / "aside"
    lock = RunLock(tmp_path, job=None)
    lock._create()

    def after(*moments: Callable[[], object]) -> list[int]:
        """The requests to stop when each beat comes after one of these."""
        left = list(moments)
        monkeypatch.setattr(lock._stop, "wait", lambda _: not left or (left.pop(0)(), False)[1])
        lock._beat()
        asked = list(stops)
        stops.clear()
        return asked

    def away() -> None:
        os.rename(lock.path, aside)

    def back() -> None:
        os.rename(aside, lock.path)
        os.utime(lock.path, (0, 0))

    assert after(away, back, away, back) == []
    assert lock.path.stat().st_mtime > 0, "a sign of life"
    assert after(away, time.time) == [signal.SIGTERM]
    back()
    monkeypatch.setattr(run_lock, "read_lock", lambda _: looks.pop(0) if looks else read_lock(_))
    looks = [None]
    assert after(time.time, time.time) == [], "it is back before it can be looked for again"
    assert after(lambda: lock.path.write_text("{}")) == [signal.SIGTERM]
    assert after(lambda: foreign(tmp_path)) == [signal.SIGTERM]
    lock.__exit__()
    assert read_lock(tmp_path)["token"] == "theirs"  # type: ignore[index]


def test_a_living_job_elsewhere_is_named(tmp_path: Path) -> None:
    path = foreign(tmp_path, job_id="12", nodes="node[3-4]")
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        named = pytest.raises(RunHeld, match=r"SLURM job 12 on node\[3-4\], process 7 of elsewhere.*scancel 12")
        with named, RunLock(tmp_path, job=None, **HELD):
            pass
    finally:
        stop.set()
        thread.join()
    assert read_lock(tmp_path)["token"] == "theirs"  # type: ignore[index]


def test_a_task_of_an_array_is_named_by_its_own_name(tmp_path: Path) -> None:
    """The last task's plain id is the whole array's: to end it would end the others."""
    task = Job(job_id="2", array_task="2_8", nodes="node1")
    named = pytest.raises(RunHeld, match=r"SLURM job 2_8 on node1.*\(scancel 2_8\)")
    with RunLock(tmp_path, job=task, **HELD), named, RunLock(tmp_path, job=None, **HELD):
        pass
    with recorded(tmp_path, task, 0):
        pass
    assert Attempts(tmp_path).all()[0]["job_id"] == "2_8"


def test_silence_is_waited_for_and_then_taken_over(tmp_path: Path) -> None:
    foreign(tmp_path)
    began = time.time()
    with RunLock(tmp_path, job=None, **FAST) as lock:
        assert lock.last_sign is not None
        assert lock.last_sign < began + 0.1
        assert read_lock(tmp_path)["pid"] == os.getpid()  # type: ignore[index]


def test_a_dead_process_of_this_host_does_not_hold_it(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from dayzero.run_lock import RunLock; import os\n\
RunLock(Path({str(tmp_path)!r}), job=None).__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert read_lock(tmp_path)
    with RunLock(tmp_path, job=None, beat=15, stale_after=1e9):
        pass


def test_a_job_that_was_put_back_is_not_its_own_rival(tmp_path: Path) -> None:
    foreign(tmp_path, job_id="12", restarts=0)
    with RunLock(tmp_path, job=Job(job_id="12", restarts=1), beat=15, stale_after=1e9):
        pass


@pytest.mark.parametrize("states", [{"12": "NODE_FAIL"}, {}])
def test_a_job_that_left_the_queue_does_not_hold_it(
    tmp_path: Path, states: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(tmp_path, job_id="12")
    monkeypatch.setattr(slurm, "job_states", lambda _: states)
    with RunLock(tmp_path, job=None, beat=15 if states else 0.05, stale_after=1e9):
        pass


def test_a_living_job_that_the_queue_does_not_show_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites hide others' jobs, and two clusters may share a file system."""
    monkeypatch.setattr(slurm, "job_states", lambda _: {})
    slow: dict[str, float] = {"beat": 1, "stale_after": 60}  # three beats of silence are as good as none in the queue
    named = pytest.raises(RunHeld, match="SLURM job 12")
    with RunLock(tmp_path, job=Job(job_id="12"), **slow), named, RunLock(tmp_path, job=None, **slow):
        pass


def test_a_watched_job_is_asked_for_once_a_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(slurm, "job_states", lambda _: asked.append(time.monotonic()) or {"12": "RUNNING"})
    foreign(tmp_path, job_id="12")
    with RunLock(tmp_path, job=None, beat=0.6, stale_after=4):
        pass
    assert 2 <= len(asked) <= 7
    assert all(later - earlier >= 0.6 for earlier, later in pairwise(asked))


def test_of_two_that_find_a_dead_one_one_wins(tmp_path: Path) -> None:
    foreign(tmp_path, job_id=None, host="elsewhere")
    os.utime(tmp_path / LOCK, (0, 0))
    held, refused = [], []
    over = threading.Event()

    def take() -> None:
        try:
            with RunLock(tmp_path, job=None, beat=0.5, stale_after=60):
                held.append(1)
                over.wait(60)
        except RunHeld:
            refused.append(1)
            if len(refused) == 3:
                over.set()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 3)


def test_attempts_tell_how_each_start_ended(tmp_path: Path) -> None:
    job = Job(job_id="5", nodes="n1", num_nodes=1, gpus=4, restarts=0)
    checkpoint = tmp_path / "checkpoints/step_3"

    def fail() -> None:
        with recorded(tmp_path, job, 0):
            checkpoint.mkdir(parents=True)
            (checkpoint / "trainer.json").write_text("{}")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    Attempts(tmp_path).begin(job, 3, "n1")  # killed: never says how it ended
    with recorded(tmp_path, Job(job_id="5", gpus=4, restarts=1), 0, last_sign=time.time() + 3600):
        (tmp_path / "summary.json").write_text("{}")
    first, second, third = Attempts(tmp_path).all()
    assert (first["outcome"], first["from_step"], first["to_step"]) == ("failed", 0, 3)
    assert (second["outcome"], third["outcome"], third["requeues"]) == ("lost", "finished", 1)
    assert second["gpu_hours"] == pytest.approx(4, abs=0.01)  # alive for an hour, as its lock told


def test_half_a_line_of_a_killed_process_costs_no_attempt(tmp_path: Path) -> None:
    record = Attempts(tmp_path)
    record.begin(None, 0, "n1")
    with open(record.path, "a") as f:
        f.write('{"end": {"ended"')
    assert [attempt["host"] for attempt in record.all()] == ["n1"]
    record.begin(None, 2, "n2")
    assert [attempt["host"] for attempt in record.all()] == ["n1", "n2"]
    assert record.path.read_bytes().count(b"\n") == 2


def test_lines_of_a_file_that_grows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"step": 1}\n{"st')
    assert read_json_lines(path, growing=True) == [{"step": 1}]
    for text, says in (('{"step": 1}\n{"st', "2 is not JSON .*: remove it"), ("[1]\n", "1 holds no JSON object")):
        path.write_text(text)
        with pytest.raises(DataError, match=f"metrics.jsonl:{says}"):
            read_json_lines(path)


def test_energy_is_read_while_the_ranks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM tells it of running steps only, so at the end it is too late; a site that measures none is asked once."""
    readings = [100, 250]
    told = threading.Event()

    def energy(job_id: str) -> int | None:
        assert job_id == "5"
        if not readings:
            told.set()
            return None
        return readings.pop(0)

    monkeypatch.setattr(slurm, "energy_joules", energy)
    monkeypatch.setattr(attempts, "ENERGY_SECONDS", 0.01)
    with recorded(tmp_path, Job(job_id="5"), 0):
        assert told.wait(20)
    (attempt,) = Attempts(tmp_path).all()
    assert attempt["energy_joules"] == 250


def test_a_stop_before_the_first_step_has_no_checkpoint_to_tell_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    for says in ("stopped as asked before a first step: start", "stopped as asked with a checkpoint in"):
        with caplog.at_level("WARNING", logger="dayzero"), pytest.raises(SystemExit):
            stop_or_go_on(tmp_path, None, max_requeues=1)
        assert says in caplog.messages[-1]
        (tmp_path / "checkpoints/step_2").mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkpoints/step_2/trainer.json").write_text("{}")


@pytest.mark.parametrize("time_limit", [None, 60.0])
def test_a_stop_in_time_needs_the_end_alone(monkeypatch: pytest.MonkeyPatch, time_limit: float | None) -> None:
    """In a container without SLURM's commands the end is all that is known."""
    stopped = threading.Event()
    before = signal.signal(signal.SIGUSR1, lambda *_: stopped.set())
    try:
        job = Job(job_id="5", ends=time.time() + 10, time_limit=time_limit)
        with stopped_in_time(job, 9.9):
            assert stopped.wait(20)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_job_that_gets_nowhere_is_not_put_back_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(slurm, "put_back", lambda job_id: asked.append(job_id))
    monkeypatch.setattr("dayzero.interruption.SECONDS_TO_END", 0)
    job = Job(job_id="5", restarts=2)
    for start in range(MAX_WITHOUT_A_STEP):
        with recorded(tmp_path, job, 0):
            pass
        with pytest.raises(SystemExit) as stop:
            stop_or_go_on(tmp_path, job, max_requeues=100)
        assert stop.value.code == EXIT_INTERRUPTED
        assert len(asked) == min(start + 1, MAX_WITHOUT_A_STEP - 1)
    asked.clear()
    with pytest.raises(SystemExit):
        stop_or_go_on(tmp_path / "new", job, max_requeues=2)
    assert not asked


def test_a_job_that_is_put_back_ends_with_slurm_s_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "put_back", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before, began = signal.getsignal(signal.SIGTERM), time.monotonic()
    with pytest.raises(SystemExit) as stop:
        stop_or_go_on(tmp_path, Job(job_id="5"), max_requeues=2)
    assert stop.value.code == EXIT_INTERRUPTED
    assert time.monotonic() - began < 30
    assert signal.getsignal(signal.SIGTERM) == before


def test_runs_that_share_a_job_may_save_before_it_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(slurm, "put_back", lambda job_id: done.append("put back"))
    monkeypatch.setattr("dayzero.interruption.SECONDS_TO_END", 0)
    monkeypatch.setattr("dayzero.interruption.time.sleep", lambda seconds: done.append(f"{seconds:.0f}"))
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    for ends, step, expected in ((100, True, "30"), (20, True, "10"), (-5, True, "0"), (100, False, "put back")):
        done.clear()
        monkeypatch.setenv("SLURM_STEP_ID", "1")
        if not step:
            monkeypatch.delenv("SLURM_STEP_ID")
        with pytest.raises(SystemExit):
            stop_or_go_on(tmp_path / "new", Job(job_id="5", ends=time.time() + ends), max_requeues=9, notice=60)
        assert done[0] == expected
        assert "put back" in done
