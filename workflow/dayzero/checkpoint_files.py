"""The folders of a run's checkpoints by their names alone, for whatever must not import torch."""

from __future__ import annotations

import re
from pathlib import Path


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [
        p for p in directory.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and (p / "trainer.json").is_file()
    ]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The N of `step_N`."""
    return int(path.name.removeprefix("step_"))
