"""A request to stop may come at any moment: while training starts, when its work is over, and as Python ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from dayzero import attempts, gpu_shares, slurm
from dayzero.engine import signals
from dayzero.engine.launch import StoppedEarly
from dayzero.engine.signals import STOP_ASKED
from dayzero.interruption import EXIT_INTERRUPTED
from dayzero.stages.training import launch


def python(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", script] if script else []), *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, text=True, capture_output=True, timeout=120, check=False
    )


AT_THE_END = """
import os, signal, sys
from dayzero.engine.signals import StopRequest, never_ended_by_a_stop

class Last:
    def __del__(self):  # Python takes its modules down and has gone back to the signals' default
        for s in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), s)
        os.write(1, b"to the end")

def main():
    with StopRequest() as stop:
        pass
    os.kill(os.getpid(), signal.SIGUSR1)  # all steps are done, the results are being written
    return 0

sys.modules["last"] = Last()
sys.exit(never_ended_by_a_stop(main))
"""


def test_a_stop_when_all_work_is_done_ends_nothing() -> None:
    done = python(AT_THE_END)
    assert (done.returncode, done.stdout) == (0, "to the end"), done.stderr


BEFORE_RANKS = """
import os, signal, sys
from dayzero.engine.launch import StoppedEarly, run_torchrun, signals_passed_on
from dayzero.engine.signals import STOP_ASKED, never_ended_by_a_stop

def main():
    os.kill(os.getpid(), signal.SIGUSR1)
    with signals_passed_on():
        assert os.environ[STOP_ASKED]  # a rank that is started all the same knows of it
    assert STOP_ASKED not in os.environ
    try:
        run_torchrun("no.such.module", [], 2)
    except StoppedEarly as stop:
        return 0 if stop.sure else 1
    return 2

sys.exit(never_ended_by_a_stop(main))
"""


def test_a_stop_while_torch_is_imported_starts_no_rank() -> None:
    assert python(BEFORE_RANKS).returncode == 0


def test_a_stop_while_a_training_waits_for_gpus_starts_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu_shares.VISIBLE, "0")
    monkeypatch.setattr(gpu_shares, "_for_gpus", lambda: True)
    monkeypatch.setattr(gpu_shares.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(signals, "_early", [])
    monkeypatch.setattr(gpu_shares.time, "sleep", lambda _: signals._early.append(signal.SIGTERM))
    monkeypatch.setattr(launch, "run_torchrun", lambda *_: pytest.fail("it was asked to stop"))
    args = SimpleNamespace(nodes=1, network_interface=None, stop_before=0)
    with gpu_shares.own_gpus(1), pytest.raises(StoppedEarly):
        launch._run_ranks(1, args, [], None)  # type: ignore[arg-type]


def test_a_rank_knows_of_a_stop_that_came_before_it() -> None:
    script = "from dayzero.engine.signals import *; note_early(); raise SystemExit(StopRequest().asked)"
    assert python(script).returncode == 0
    assert python(script, **{STOP_ASKED: "1"}).returncode == 1


def test_a_node_that_is_asked_to_stop_before_its_ranks_ends_the_others_ranks_too(tmp_path: Path) -> None:
    """srun ends the others when one ends with another code than 0; they would wait for this node's ranks."""
    (tmp_path / "probe.json").write_text('{"clock_offset": 0, "host": "node1"}')
    arguments = ["-m", "dayzero.engine.node", "--nodes", "2", "--processes", "1", "--endpoint", "localhost:1"]
    arguments += ["--id", "7-0", "--meeting", str(tmp_path), "--logs", str(tmp_path), "--", "no.such.module"]
    done = python("", *arguments, **{STOP_ASKED: "1", "SLURM_NODEID": "1"})
    assert done.returncode == EXIT_INTERRUPTED, done.stderr
    assert (tmp_path / "early-1").exists()


@pytest.mark.parametrize("is_done", [True, False])
@pytest.mark.parametrize("early", [True, False])
def test_a_stop_after_the_last_word_of_a_training_keeps_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_done: bool, early: bool
) -> None:
    """Its job would go back into the queue, which removes them."""

    def ranks(*_: object) -> bool:
        if is_done:
            (tmp_path / "summary.json").write_text("{}")
        if early:
            raise StoppedEarly([signal.SIGUSR1])
        return False

    put_back: list[object] = []
    monkeypatch.setattr(launch, "_run_ranks", ranks)
    monkeypatch.setattr(launch, "stop_or_go_on", lambda *given: put_back.append(given))
    monkeypatch.setattr(launch, "check_all", lambda *_: None)
    monkeypatch.setattr(launch, "_set_aside_other_checkpoints", lambda *_: None)
    monkeypatch.setattr(slurm, "current_job", lambda: None)
    monkeypatch.setattr(attempts, "recorded", lambda *_: nullcontext())
    run = SimpleNamespace(
        parallelism=SimpleNamespace(world_size=1), train=SimpleNamespace(checkpoint=SimpleNamespace(every=0))
    )
    monkeypatch.setattr(launch, "read_run", lambda _: run)
    launch.launch(SimpleNamespace(output=tmp_path, max_requeues=1, stop_before=0), [])
    assert bool(put_back) != is_done


ONE_FAILS = """
import os, sys, time
from pathlib import Path
from dayzero.engine.launch import EXIT_INTERRUPTED, RankFailed, errors_reported, run_torchrun
from dayzero.engine.signals import note_early, noted

rank = os.environ.get("RANK")
other = Path("the other is there")
if rank == "0":
    with errors_reported(0):
        while not other.exists():
            time.sleep(0.05)
        raise ValueError("a mistake")
elif rank == "1":
    note_early()
    other.touch()
    while not noted():
        time.sleep(0.05)
    sys.exit(EXIT_INTERRUPTED)
else:
    try:
        print(run_torchrun("one_fails", [], 2))
    except RankFailed as error:
        print(error)
"""


def test_a_rank_that_stops_because_another_has_failed_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun ends the ranks that are left with SIGTERM, which asks a training to stop."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one_fails.py").write_text(ONE_FAILS)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = python("", "-m", "one_fails", PYTHONPATH=path, OMP_NUM_THREADS="1")
    assert done.stdout == "rank 0: a mistake\n", done.stderr
