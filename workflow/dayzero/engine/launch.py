"""Starting torchrun from within a stage, and saying in one line why a rank failed."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from dayzero.console import log
from dayzero.engine.signals import SIGNALS, STOP_ASKED, noted
from dayzero.errors import Told, one_line
from dayzero.interruption import EXIT_INTERRUPTED as EXIT_INTERRUPTED
from dayzero.parent import end_with_parent

_ERRORS = "DAYZERO_ERROR_DIR"
_LAUNCHER = "DAYZERO_LAUNCHER"
"""Environment variable: the process id of a rank's parent."""
RANK_LOGS = "DAYZERO_RANK_LOGS"
"""Environment variable: the folder in which each rank keeps what it prints."""


class RankFailed(Told):
    """A training process failed; the message is that rank's own last line, `traceback` is its own too."""

    def __init__(self, line: str, traceback: str = "") -> None:
        super().__init__(line)
        self.traceback = traceback


class RankKilled(RankFailed):
    """A training process was killed, which the errors of the others, who miss it, do not say."""


class StoppedEarly(Exception):
    """Asked to stop before a rank was up to it: training had not begun, so the other nodes need not wait for anything.

    `sure` where SIGUSR1 asked; SIGTERM is also what the other nodes get when one has failed.
    """

    def __init__(self, asked: Sequence[int]) -> None:
        super().__init__("stopped as asked before training began")
        self.sure = signal.SIGUSR1 in asked


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_RANK" in os.environ


def reports_errors() -> bool:
    """Whether a stage started torchrun, and so says the error that `errors_reported` leaves."""
    return _ERRORS in os.environ


def run_torchrun(
    module: str,
    arguments: list[str],
    processes: int,
    *,
    rendezvous: Sequence[str] = ("--standalone",),
    errors: Path | None = None,
) -> bool:
    """Run `python -m module arguments` in `processes` local ranks; False when they stopped as asked.

    SIGTERM, SIGUSR1 and SIGINT are passed on to the ranks, which have as long as they need to write a checkpoint; a
    second SIGINT ends them at once, with KeyboardInterrupt here. `rendezvous` are torchrun's options of a world over
    several nodes; `errors` is then the folder for the errors of all ranks. Raises `RankFailed` with the first failing
    rank's error, `StoppedEarly` where the stop was asked for before the ranks could heed it.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # torchrun's own report of a failure is pages long; ours is the rank's error
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # what the whole job may use (Snakemake sets the variable to a rule's threads) is shared among the ranks
    cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // processes))
    with tempfile.TemporaryDirectory(prefix="dayzero-torchrun-") as own, signals_passed_on(kill=True) as asked:
        folders = [errors, Path(own)] if errors else [Path(own)]
        os.environ |= {_ERRORS: os.pathsep.join(map(str, folders)), _LAUNCHER: str(os.getpid())}
        if asked:
            raise StoppedEarly(asked)
        try:
            # torchrun would make a folder of logs in the machine's temporary folder and leave it there
            logs = f"--log-dir={own}/torchrun"
            # its parser would take arguments of ours that begin like its own
            options = parse_args([*rendezvous, f"--nproc-per-node={processes}", logs, "-m", module])
            options.training_script_args = arguments
            # torchrun's handler of the other signals kills ranks after 30 s, perhaps in the middle of a checkpoint
            options.signals_to_handle = "SIGHUP,SIGQUIT"
            run(options)
        except ChildFailedError as failed:
            codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
            # torchrun ends the others when one has failed, and they may take that for a request to stop
            if EXIT_INTERRUPTED in codes.values() and (asked or not first_report(*folders)):
                return False
            early = StoppedEarly(asked)
            if asked and _by_a_stop(codes) and (early.sure or not first_report(*folders)):
                raise early from None
            raise _failure(folders, codes) from None
    return True


def end_with_launcher() -> None:
    """In a rank: end as soon as the process that started it is gone. It would train on beside the next start."""
    launcher = os.environ.get(_LAUNCHER)
    if launcher is not None:  # else torchrun was started by hand
        end_with_parent(int(launcher))


def keep_output() -> None:
    """In a rank over several nodes: what this process prints goes to rank_N.log; rank 0's own log is still shown."""
    folder = os.environ.get(RANK_LOGS)
    if not folder:
        return
    rank = os.environ["RANK"]
    shown = os.fdopen(os.dup(2), "w", buffering=1)
    file = os.open(Path(folder) / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    for handler in log.handlers:
        if rank == "0" and type(handler) is logging.StreamHandler:
            handler.setStream(shown)


@contextmanager
def errors_reported(rank: int) -> Iterator[None]:
    """In a rank: leave an error where `run_torchrun` finds it, then exit."""
    try:
        yield
    except Exception as error:
        for folder in filter(None, os.environ.get(_ERRORS, "").split(os.pathsep)):
            with suppress(OSError):  # the disk may be what failed: then in this machine's own temporary folder
                leave_report(Path(folder), str(rank), one_line(error), traceback.format_exc())
                break
        raise


def leave_report(folder: Path, name: str, line: str, text: str, when: float | None = None) -> None:
    """Leave an error, with its traceback `text`, where `first_report` finds it; a whole report or none.

    `when` it happened, if not now. Raises OSError where it cannot be written.
    """
    file = folder / f"{name}.json"
    partial = file.with_suffix(".tmp")
    try:
        partial.write_text(json.dumps({"time": time.time() if when is None else when, "line": line, "traceback": text}))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def first_report(*folders: Path) -> tuple[str, dict[str, Any]] | None:
    """The rank that failed first and what it left in one of `folders`: time, line, traceback."""
    reports = [(p.stem, json.loads(p.read_text())) for folder in folders for p in folder.glob("[0-9]*.json")]
    return min(reports, key=lambda item: item[1]["time"], default=None)


def _by_a_stop(codes: dict[int, int]) -> bool:
    """Whether the ranks ended by the signal itself, as they do in their first moment."""
    return all(-code in SIGNALS for code in codes.values())


def _failure(folders: list[Path], codes: dict[int, int]) -> RankFailed:
    killed = [rank for rank, code in codes.items() if code == -signal.SIGKILL]
    if killed:
        of_job = "raise resources.train.mem_mb, or " if "SLURM_JOB_ID" in os.environ else ""
        hint = f"often the system's answer to too little memory: {of_job}lower train.local_batch_size"
        return RankKilled(f"rank {killed[0]} was killed by SIGKILL ({hint})")
    if found := first_report(*folders):
        name, first = found
        log.debug(first["traceback"])
        return RankFailed(f"rank {name}: {first['line']}", first["traceback"])
    rank, code = next(iter(codes.items()))
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    return RankFailed(f"rank {rank} {how}")


@contextmanager
def signals_passed_on(*, kill: bool = False) -> Iterator[list[int]]:
    """Inside the block a request to stop goes on to the child processes; yields the list of those that came.

    One that came before is in the list, and known to every process that is started in the block. With `kill` a second
    SIGINT kills them and interrupts this process.
    """
    asked: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        at_once = kill and number == signal.SIGINT and number in asked
        asked.append(number)
        os.environ[STOP_ASKED] = "1"  # for a child that is started only now
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL if at_once else signal.SIGUSR1)
        if at_once:
            raise KeyboardInterrupt

    before = {s: signal.signal(s, pass_on) for s in SIGNALS}
    if early := noted():
        asked += early
        os.environ[STOP_ASKED] = "1"
    try:
        yield asked
    finally:
        os.environ.pop(STOP_ASKED, None)
        for s, handler in before.items():
            signal.signal(s, handler)
