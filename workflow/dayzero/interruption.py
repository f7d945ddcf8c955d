"""What happens after training stopped as asked, with a checkpoint: the SLURM job goes back into the queue, or ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dayzero import slurm
from dayzero.attempts import Attempts, newest_step
from dayzero.console import log

EXIT_INTERRUPTED = 75
"""Exit code of training that was asked to stop and can be continued (EX_TEMPFAIL of sysexits.h)."""

MAX_WITHOUT_A_STEP = 3
"""Starts in a row that may stop before a step is done; more would repeat themselves for ever."""

SECONDS_TO_END = 60
"""How long SLURM may take to end a job that it puts back."""


@contextmanager
def stopped_in_time(job: slurm.Job, seconds: float) -> Iterator[None]:
    """Ask this process to stop `seconds` before the job's end; SLURM's own signal would end the Snakemake around it."""
    over = threading.Event()

    def wait() -> None:
        assert job.ends
        if not over.wait(max(0.0, job.ends - seconds - time.time())):
            os.kill(os.getpid(), signal.SIGUSR1)

    if job.ends and seconds:
        threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def stop_or_go_on(folder: Path, job: slurm.Job | None, max_requeues: int, notice: float = 0.0) -> None:
    """Put a SLURM job back into the queue, which ends this process; without one, or where that is refused or repeated
    in vain, exit with `EXIT_INTERRUPTED`. SLURM lets a job that was put back wait (two minutes by default).

    Runs that share the job were asked to stop together, `notice` seconds before its end. Putting it back ends them all,
    so each has half of that for its checkpoint.
    """
    checkpoint = f"with a checkpoint in {folder / 'checkpoints'}" if newest_step(folder) else "before a first step"
    checkpoint = f"stopped as asked {checkpoint}"
    if job:
        with _ends_noted() as ended:
            if reason := _why_not(folder, job, max_requeues, notice):
                log.warning("%s: start again to continue (job %s is not put back: %s)", checkpoint, job.name, reason)
                raise SystemExit(EXIT_INTERRUPTED)
            log.warning("%s: job %s is back in the queue and will go on from there", checkpoint, job.name)
            end = time.monotonic() + SECONDS_TO_END
            while not ended and time.monotonic() < end:  # an exit code before SLURM ends it: a failure to Snakemake
                time.sleep(0.2)
    else:
        log.warning("%s: start the stage again to continue", checkpoint)
    raise SystemExit(EXIT_INTERRUPTED)


@contextmanager
def _ends_noted() -> Iterator[list[int]]:
    """Yields the SIGTERMs that come inside the block: SLURM's, when it ends the job."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def _why_not(folder: Path, job: slurm.Job, max_requeues: int, notice: float) -> str | None:
    if job.restarts >= max_requeues:
        return f"it was put back {job.restarts} times, resources.train.max_requeues is {max_requeues}"
    last = Attempts(folder).all()[-MAX_WITHOUT_A_STEP:]
    if len(last) == MAX_WITHOUT_A_STEP and all(a.get("to_step", a["from_step"]) <= a["from_step"] for a in last):
        return f"its last {MAX_WITHOUT_A_STEP} starts did no step: raise resources.train.runtime"
    if slurm.in_job_step() and job.ends:
        time.sleep(max(0.0, min(notice, job.ends - time.time()) / 2))
    return slurm.put_back(job.job_id)
