"""Run jobs in real torchrun processes (gloo) and hand back what rank 0 recorded. One launch runs many jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import torch

REPOSITORY = Path(__file__).parents[2]


SETTINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Of the ranks' environment. The last one makes cuBLAS deterministic."""


def start_ranks(world_size: int, module: str, folder: Path, printed: IO[str]) -> subprocess.Popen[bytes]:
    """Start `python -m module folder` on `world_size` ranks, offline and one thread each; what they print goes to
    `printed`. They train on the CPU where there are not enough GPUs for all."""
    without_gpus = {} if torch.cuda.device_count() >= world_size else {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [
            *[sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"],
            *["-m", module, str(folder)],
        ],
        cwd=REPOSITORY,
        env={**os.environ, **SETTINGS, **without_gpus},
        stdout=printed,
        stderr=subprocess.STDOUT,
    )


def run_ranks(world_size: int, jobs: list[dict[str, Any]], folder: Path, timeout: float = 840) -> dict[str, Any]:
    """Run `jobs` (see jobs.py) one after another on `world_size` ranks; results by the job's name.

    Raises AssertionError with the end of what the ranks printed when they fail; all of it, with the time of every job,
    is in FOLDER/ranks.txt.
    """
    assert len({job["name"] for job in jobs}) == len(jobs), "two jobs of one name"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    printed = folder / "ranks.txt"
    with printed.open("w") as output:
        process = start_ranks(world_size, "tests.distributed.jobs", folder, output)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
    assert code == 0, printed.read_text()[-8000:]
    return torch.load(folder / "results.pt", weights_only=True)
