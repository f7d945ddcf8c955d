"""How much memory may be taken."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int:
    """Free bytes of the device; on a CPU also within the limit that a container or a scheduler's job has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return free
    return min(free, max(limit - used, 0))
