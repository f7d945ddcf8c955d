"""The record of every start of a training: which job, which nodes, how long, how it ended; one JSON line each way."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from dayzero import slurm
from dayzero.checkpoint_files import checkpoints, step_of
from dayzero.console import log
from dayzero.files import read_json_lines

FILE = "attempts.jsonl"


class Attempts:
    """Appends to `attempts.jsonl` of a run's train folder; a start that never ended is closed by the next one."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def begin(self, job: slurm.Job | None, step: int, host: str, last_sign: float | None = None) -> None:
        """Note that training starts from `step`; `last_sign` is when a start that never ended was last alive."""
        record: dict[str, Any] = {"started": round(time.time(), 1), "from_step": step, "host": host}
        if last_sign:
            record["previous_until"] = round(last_sign, 1)
        if job:
            record |= {
                "job_id": job.name,
                "nodes": job.nodes,
                "num_nodes": job.num_nodes,
                "gpus": job.gpus,
                "requeues": job.restarts,
            }
            record |= {"job_began": job.began} if job.began else {}
        self._append({"begin": record})

    def end(self, outcome: str, step: int, energy: int | None = None) -> None:
        """Note how it ended (finished, stopped, failed) and the step whose checkpoint is the newest."""
        record = {"ended": round(time.time(), 1), "to_step": step, "outcome": outcome}
        self._append({"end": record | ({"energy_joules": energy} if energy else {})})

    def all(self) -> list[dict[str, Any]]:
        """Every attempt; one that never said how it ended was `lost`, at the latest when the next one began.

        The newest without an end is counted until now. GPU hours count from the job's start, as SLURM's own do.
        """
        attempts: list[dict[str, Any]] = []
        for event in read_json_lines(self.path, growing=True):
            if begun := event.get("begin"):
                until = begun.pop("previous_until", begun["started"])
                if attempts and "ended" not in attempts[-1]:
                    attempts[-1] |= {"ended": until, "outcome": "lost"}
                attempts.append(dict(begun))
            elif attempts and "end" in event:
                attempts[-1] |= event["end"]
        for attempt in attempts:
            ended, started = attempt.get("ended", time.time()), attempt["started"]
            attempt["seconds"] = round(max(0.0, ended - started), 1)
            paid = max(0.0, ended - min(started, attempt.get("job_began", started)))
            attempt["gpu_hours"] = round(attempt.get("gpus", 0) * paid / 3600, 4)
        return attempts

    def _append(self, event: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as f:
            f.seek(0)
            f.truncate(f.read().rfind(b"\n") + 1)  # without half a line of a killed process
            f.write(json.dumps(event).encode() + b"\n")


ENERGY_SECONDS = 60.0
"""Between two readings of the energy that a training has used."""


@contextmanager
def recorded(
    folder: Path, job: slurm.Job | None, checkpoint_every: int, last_sign: float | None = None
) -> Iterator[None]:
    """Record the training inside the block as one attempt, and warn of a time limit below a checkpoint interval.

    The block may leave early by `return`: whether it finished is seen from summary.json, which is written last.
    """
    attempts = Attempts(folder)
    attempts.begin(job, newest_step(folder), socket.gethostname(), last_sign)
    watch = threading.Event()
    if job and job.time_limit and checkpoint_every:
        arguments = (folder / "checkpoints/metrics.jsonl", job.time_limit, checkpoint_every, watch)
        threading.Thread(target=_warn_of_a_short_limit, args=arguments, daemon=True).start()
    energy: list[int] = []
    if job:
        threading.Thread(target=_read_energy, args=(job.job_id, energy, watch), daemon=True).start()
    outcome = "failed"
    try:
        yield
        outcome = "finished" if (folder / "summary.json").exists() else "stopped"
    finally:
        watch.set()
        attempts.end(outcome, newest_step(folder), energy[-1] if energy else None)


def _read_energy(job_id: str, read: list[int], done: threading.Event) -> None:
    """Now and then while the ranks run: SLURM tells it of running steps only. Where it tells nothing, it is left."""
    while not done.wait(ENERGY_SECONDS):
        if (joules := slurm.energy_joules(job_id)) is None:
            return
        read.append(joules)


def newest_step(folder: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    found = checkpoints(folder / "checkpoints")
    return step_of(found[-1]) if found else 0


def _warn_of_a_short_limit(metrics: Path, limit: float, every: int, done: threading.Event) -> None:
    """As soon as three steps tell how long one takes."""
    began = time.time()
    while not done.wait(1):
        records = [r for r in read_json_lines(metrics, growing=True) if r.get("time", 0) > began]
        seconds = [r["step_seconds"] + r["data_seconds"] for r in records]
        if len(seconds) < 3:
            continue
        if steps := _steps_of_the_run(metrics.parents[2], records[-1]):
            every = min(every, steps)
        if (interval := median(seconds) * every) > limit:
            log.warning(
                "the job's time limit of %.0f s is shorter than the %.0f s between two checkpoints "
                "(train.checkpoint.every %d x %.2f s a step): a lost node loses the whole job's work; lower "
                "train.checkpoint.every, or raise resources.train.runtime",
                limit, interval, every, median(seconds),
            )  # fmt: skip
        return


def _steps_of_the_run(folder: Path, last: dict[str, Any]) -> int:
    """How many steps the run of this folder has, by its config.json and the metrics of its last step; 0: not known."""
    try:
        train = json.loads((folder / "config.json").read_text())["train"]
    except (OSError, ValueError, KeyError):  # a training that was started by hand has none
        return 0
    if train.get("max_steps"):
        return int(train["max_steps"])
    return round(last["step"] / last["epoch"] * (train.get("num_epochs") or 0)) if last.get("epoch") else 0
