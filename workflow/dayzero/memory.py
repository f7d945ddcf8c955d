"""How much memory may be taken: what the device has free, and what the limits of a container or a job leave.

A limit may stand at any control group above the process: SLURM's stands at the job's, some folders up. Both versions of
control groups are read, see https://docs.kernel.org/admin-guide/cgroup-v2.html and cgroup-v1/memory.html beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
"""Files of the limit and of what is used, and what memory.stat calls the part of it that the kernel gives back."""


def available_memory(device: torch.device) -> int:
    """Free bytes of the device; on a CPU no more than any limit on this process leaves."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_left()])


def _left() -> Iterator[int]:
    """Bytes that each limit leaves."""
    for folder, (limit_file, used_file, given_back) in _groups():
        try:
            limit, used = int((folder / limit_file).read_text()), int((folder / used_file).read_text())
        except (OSError, ValueError):  # not there, or "max": no limit
            continue
        yield max(limit - used + _statistic(folder, given_back), 0)  # files that were read stay until there is need


def _statistic(folder: Path, name: str) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def _groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of the groups that this process is in, with the names that their files have there."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:  # number:controllers:path, version 2 without controllers
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, names = (GROUPS / "memory", V1) if controllers else (GROUPS, V2)
        # a path as the host sees it is not there within a container: its own group is then the mount itself
        folder = mount / path.lstrip("/") if ".." not in Path(path).parts else mount
        yield from ((group, names) for group in (folder, *folder.parents) if group.is_relative_to(mount))
