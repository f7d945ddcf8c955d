"""Run jobs in several processes and hand back what rank 0 recorded. One launch runs many jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_ranks(world_size: int, jobs: list[dict[str, Any]], folder: Path, timeout: float = 840) -> dict[str, Any]:
    """Run `jobs` (see jobs.py) one after another on `world_size` ranks; results by the job's name.

    Raises AssertionError with the end of what the ranks printed when one fails.
    """
    assert len({job["name"] for job in jobs}) == len(jobs), "two jobs of one name"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    # a fork cannot use a GPU that its parent has looked at
    failed = (_torchrun if torch.cuda.is_available() else _forks)(world_size, folder, timeout)
    if failed:
        printed = {path.stem: path.read_text()[-4000:] for path in sorted(folder.glob("rank*.txt"))}
        raise AssertionError("\n".join([failed, *(f"{rank}: {text}" for rank, text in printed.items())]))
    return torch.load(folder / "results.pt", weights_only=True)


def _forks(world_size: int, folder: Path, timeout: float) -> str:
    """Run the jobs in forks of a process that has imported everything; how a rank failed, if one did."""
    server = _server()
    assert server.stdin
    assert server.stdout
    server.stdin.write(json.dumps({"world_size": world_size, "folder": str(folder), "timeout": timeout}) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    return answer.strip() if answer else f"the server of ranks ended with code {server.wait()}"


@cache
def _server() -> subprocess.Popen[str]:
    """One for all launches of this process: importing the engine takes longer than many a job."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.rank_server"],
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _torchrun(world_size: int, folder: Path, timeout: float) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    command += ["-m", "tests.distributed.jobs", str(folder)]
    with (folder / "ranks.txt").open("w") as printed:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **ENVIRONMENT},
            stdout=printed,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
    return f"torchrun ended with code {done.returncode}" if done.returncode else ""
