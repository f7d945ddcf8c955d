"""metrics.jsonl: one line a step, kept through interruptions."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from dayzero.files import atomic_file, read_json_lines
from dayzero.provenance import peak_memory_gib as peak_resident_gib


class MetricsLog:
    """Appends step records to a file; on resume the lines after the checkpoint's step are cut off."""

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self.path, self.enabled = path, enabled
        self.records: list[dict[str, Any]] = []

    def start_after(self, step: int) -> None:
        """Keep the records up to `step` of an earlier process."""
        if not self.enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.records = [r for r in read_json_lines(self.path, growing=True) if r["step"] <= step] if step else []
        with atomic_file(self.path) as temporary:
            temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records))

    def write(self, record: dict[str, Any]) -> None:
        if not self.enabled:
            return
        record = {**record, "time": round(time.time(), 3)}
        self.records.append(record)
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(record, allow_nan=False) + "\n")


def speed(
    num_tokens: int, seconds: float, data_seconds: float, world_size: int, flops: float, peak: float | None
) -> dict[str, float | None]:
    """The timing keys of metrics.jsonl; tokens a second and mfu count the wait for data.

    `flops`: operations that the step needs on all ranks; `peak`: those a second that one device can do, if known.
    """
    whole = max(seconds + data_seconds, 1e-9)
    rate = num_tokens / whole
    return {
        "tokens_per_second": rate,
        "tokens_per_second_per_gpu": rate / world_size,
        "mfu": flops / (whole * world_size * peak) if peak else None,
        "step_seconds": seconds,
        "data_seconds": data_seconds,
    }


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank: allocated on its GPU, or resident on a CPU; GiB."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return peak_resident_gib()
