"""One training task that several programs do alike, each in a process of its own, and what is measured of it.

A task is a JSON file: the model's directory, a PEFT adapter's initial values, documents with labels, and the settings.
Step s takes documents [s * batch_size, (s + 1) * batch_size) in every program, so losses can be compared step by step.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "MEASURED "


@dataclass(kw_only=True)
class Task:
    """What is trained, and how."""

    model: str
    """A Hugging Face directory."""
    documents: str
    """JSON lines: `input_ids` and `labels` of a document (a label is the token at its own place, or -100)."""
    adapter: str | None = None
    """A PEFT directory with the adapter's initial values; None trains all weights."""
    rank: int = 16
    alpha: float = 32.0
    batch_size: int
    """Documents in an optimizer step."""
    local_batch_size: int | None = None
    """Documents in a forward pass, where a program's setting does not say; None: all of a step's."""
    steps: int
    """Optimizer steps, warm-up ones included."""
    warmup: int = 1
    """Steps left out of the timing."""
    lr: float = 5e-4
    precision: str = "bf16"
    flops_per_step: float = 0.0
    """Operations that a step needs (see the engine's flops.py); 0: not counted."""

    def read_documents(self) -> list[dict[str, list[int]]]:
        """The documents of all steps, in order."""
        lines = Path(self.documents).read_text().splitlines()[: self.batch_size * self.steps]
        assert len(lines) == self.batch_size * self.steps, f"{self.documents}: too few documents"
        return [json.loads(line) for line in lines]


@dataclass(kw_only=True)
class Measured:
    """What one process did."""

    way: str
    step_seconds: list[float]
    """From the end of one step to the end of the next, waiting for data included; the first from the start."""
    step_cpu_seconds: list[float]
    """CPU time of this process in the same spans: what to compare on a machine that others use too."""
    losses: list[float]
    num_tokens: list[int]
    """Of each step, padding left out."""
    peak_gib: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    def rate(self, warmup: int) -> float:
        """Tokens a second behind the warm-up steps."""
        return sum(self.num_tokens[warmup:]) / sum(self.step_seconds[warmup:])

    def cpu_rate(self, warmup: int) -> float:
        """Tokens a second of CPU time behind the warm-up steps."""
        return sum(self.num_tokens[warmup:]) / sum(self.step_cpu_seconds[warmup:])


class Clock:
    """Wall and CPU time between the ends of steps."""

    def __init__(self) -> None:
        self.ends = [(time.perf_counter(), time.process_time())]

    def start(self) -> None:
        """Begin the first step."""
        self.ends = [(time.perf_counter(), time.process_time())]

    def tick(self) -> None:
        """A step has ended."""
        self.ends.append((time.perf_counter(), time.process_time()))

    def spans(self) -> dict[str, list[float]]:
        """The two lists of seconds of `Measured`."""
        pairs = list(zip(self.ends, self.ends[1:], strict=False))
        wall, cpu = ([b[i] - a[i] for a, b in pairs] for i in (0, 1))
        return {"step_seconds": wall, "step_cpu_seconds": cpu}


def peak_resident_gib() -> float:
    """Largest resident memory of this process. Not `ru_maxrss` where it can be had better: that starts from what the
    process which started this one held."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def report(measured: Measured) -> None:
    """Hand the result to the process that started this one."""
    measured.peak_gib = measured.peak_gib or peak_resident_gib()
    print(MARK + json.dumps(asdict(measured)), flush=True)


def lengths_by_step(task: Task, documents: list[dict[str, list[int]]]) -> list[int]:
    """Tokens of each step."""
    lengths = [len(d["input_ids"]) for d in documents]
    return [sum(lengths[i : i + task.batch_size]) for i in range(0, len(lengths), task.batch_size)]


def measure(
    module: str, arguments: Sequence[str], *, launcher: str = "", environment: dict[str, str] | None = None
) -> Measured:
    """Run `python -m module arguments` in a new process behind the words of `launcher`; what it reports.

    Raises `RuntimeError` with the end of its output where it fails.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "workflow"), os.environ.get("PYTHONPATH", "")])
    command = [*shlex.split(launcher), sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {}), "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True
    )
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return Measured(**json.loads(line.removeprefix(MARK)))
    said = (done.stdout + done.stderr).strip()[-2000:]
    raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
