"""What is asked about a training that met a fault."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
from dayzero.files import read_json
from dayzero.slurm import parse_job

from tests.slurm.conftest import Site


def status(site: Site, run: str) -> dict[str, object]:
    """The run's row of `make status`."""
    command = [sys.executable, "-m", "dayzero.status", "--experiment", "tiny", "--once", "--json"]
    done = subprocess.run(command, cwd=site.path, env=site.environment, text=True, capture_output=True, check=True)
    return next(row for row in map(json.loads, done.stdout.splitlines()) if row["run"] == run)


def outcomes(site: Site, run: str) -> list[str]:
    return [a.get("outcome", "training") for a in read_json(site.folder(run) / "summary.json")["attempts"]]


def go_on(ranks: list) -> None:  # type: ignore[type-arg]
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):  # SLURM wakes what it ends
            rank.send_signal(signal.SIGCONT)


def restarts(site: Site, job: str) -> int:
    """How often SLURM has put the job back into the queue."""
    return parse_job(site.cluster.call("scontrol", "show", "job", "-o", job)).restarts
