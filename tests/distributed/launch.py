"""Run jobs in several processes (gloo) and hand back what rank 0 recorded. One launch runs many jobs."""

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


def run_ranks(world_size: int, jobs: list[dict[str, Any]], folder: Path, timeout: float = 840) -> dict[str, Any]:
    """Run `jobs` (see jobs.py) one after another on `world_size` ranks; results by the job's name.

    Raises AssertionError with the end of what each rank printed when one fails.
    """
    assert len({job["name"] for job in jobs}) == len(jobs), "two jobs of one name"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    server = _server()
    assert server.stdin
    assert server.stdout
    server.stdin.write(json.dumps({"world_size": world_size, "folder": str(folder), "timeout": timeout}) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if answer != "\n":
        printed = {path.stem: path.read_text()[-4000:] for path in sorted(folder.glob("rank_*.txt"))}
        failed = answer.strip() or f"the server of ranks ended with code {server.wait()}"
        raise AssertionError("\n".join([failed, *(f"{rank}: {text}" for rank, text in printed.items())]))
    return torch.load(folder / "results.pt", weights_only=True)


@cache
def _server() -> subprocess.Popen[str]:
    """One for all launches of this process: importing the engine takes longer than many a job."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    command = [sys.executable, "-m", "tests.distributed.rank_server"]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
