"""Starting torchrun from within a stage, and saying in one line why a rank failed."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from dayzero.console import log
from dayzero.errors import one_line

EXIT_INTERRUPTED = 75
"""Exit code of training that was asked to stop and can be continued (EX_TEMPFAIL of sysexits.h)."""

_ERRORS = "DAYZERO_ERROR_DIR"


class RankFailed(ValueError):
    """A training process failed; the message is that rank's own last line (a ValueError: it is said as it is)."""


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "LOCAL_RANK" in os.environ


def reports_errors() -> bool:
    """Whether a stage started torchrun, and so says the error that `errors_reported` leaves."""
    return _ERRORS in os.environ


def run_torchrun(module: str, arguments: list[str], processes: int) -> bool:
    """Run `python -m module arguments` in `processes` local ranks; False when they stopped as asked.

    SIGTERM, SIGUSR1 and SIGINT are passed on to the ranks, which have as long as they need to write a checkpoint.
    Raises `RankFailed` with the first failing rank's error.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # torchrun's own report of a failure is pages long; ours is the rank's error
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # what the whole job may use (Snakemake sets the variable to a rule's threads) is shared among the ranks
    cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // processes))
    with tempfile.TemporaryDirectory(prefix="dayzero-errors-") as errors, _signals_passed_on():
        os.environ[_ERRORS] = errors
        try:
            # torchrun's parser would take arguments of ours that begin like its own
            options = parse_args(["--standalone", f"--nproc-per-node={processes}", "-m", module])
            options.training_script_args = arguments
            # torchrun's handler of the other signals kills ranks after 30 s, perhaps in the middle of a checkpoint
            options.signals_to_handle = "SIGHUP,SIGQUIT"
            run(options)
        except ChildFailedError as failed:
            codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
            if EXIT_INTERRUPTED in codes.values():
                return False
            raise RankFailed(_first_error(Path(errors), codes)) from None
    return True


@contextmanager
def errors_reported(rank: int) -> Iterator[None]:
    """In a rank: leave an error where `run_torchrun` finds it, then exit."""
    try:
        yield
    except Exception as error:
        if folder := os.environ.get(_ERRORS):
            report = {"time": time.time(), "line": one_line(error), "traceback": traceback.format_exc()}
            (Path(folder) / f"{rank}.json").write_text(json.dumps(report))
        raise


def _first_error(folder: Path, codes: dict[int, int]) -> str:
    reports = [(json.loads(p.read_text()), p.stem) for p in folder.glob("*.json")]
    if reports:
        first, name = min(reports, key=lambda item: item[0]["time"])
        log.debug(first["traceback"])
        return f"rank {name}: {first['line']}"
    rank, code = next(iter(codes.items()))
    if code < 0:
        killer = signal.Signals(-code).name
        hint = " (often the system's answer to too little memory: lower train.local_batch_size)" if code == -9 else ""
        return f"rank {rank} was killed by {killer}{hint}"
    return f"rank {rank} exited with code {code}"


@contextmanager
def _signals_passed_on() -> Iterator[None]:
    def pass_on(_: int, __: FrameType | None) -> None:
        for child in psutil.Process().children():
            child.send_signal(signal.SIGUSR1)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
