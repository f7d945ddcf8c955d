"""GPUs shared out among what runs side by side: grouped small runs in one allocation, or all jobs on one machine.

Each sees all GPUs there, and each would take the first. So a stage locks as many as it uses, in files of this machine,
and shows what it starts no others. The system frees a lock with the process that held it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

from dayzero.console import log
from dayzero.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
SECONDS = 2.0
"""Between two looks for free GPUs."""


@contextmanager
def own_gpus(wanted: int, waiting: Callable[[], None] = lambda: None) -> Iterator[list[str]]:
    """Inside the block `CUDA_VISIBLE_DEVICES` names `wanted` GPUs that nothing else has that asked here.

    They are shared out within a SLURM job, and outside of SLURM among all that the user runs on the machine. While too
    few are free it waits, and calls `waiting` before each new look. To be called before CUDA is used. Yields their
    names; where there are fewer than `wanted`, or none at all, nothing is changed.

    Raises:
        ConfigError: the folder of the locks belongs to somebody else.
    """
    before = os.environ.get(VISIBLE)
    there = _there(before)
    if len(there) < wanted or not there:
        yield there
        return
    taken = _take(there, wanted, _folder(os.environ.get("SLURM_JOB_ID") or "local"), waiting)
    os.environ[VISIBLE] = ",".join(taken)
    if len(there) > wanted:
        log.info("GPUs %s of %d", os.environ[VISIBLE], len(there))
    try:
        yield list(taken)
    finally:
        for file in taken.values():
            os.close(file)
        if before is None:
            os.environ.pop(VISIBLE, None)
        else:
            os.environ[VISIBLE] = before


def _there(visible: str | None) -> list[str]:
    """The names of the GPUs that `CUDA_VISIBLE_DEVICES` leaves: up to the first that is none (-1, NoDevFiles)."""
    if not _for_gpus():
        return []
    if visible is None:
        return [str(number) for number in range(_count())]
    names = [name.strip() for name in visible.split(",")]
    return list(takewhile(lambda name: name.isdigit() or name.startswith(("GPU-", "MIG-")), names))


def _for_gpus() -> bool:
    """Whether this torch can use any."""
    import torch

    return torch.backends.cuda.is_built()


def _count() -> int:
    import torch

    return torch.cuda.device_count()


def _folder(job: str) -> Path:
    """Of the locks within `job` on this machine: temporary files may lie where other machines see them too."""
    path = Path(tempfile.gettempdir()) / f"dayzero-gpus-{os.getuid()}-{socket.gethostname()}-{job}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to somebody else: remove it, or set TMPDIR to a folder of your own")
    return path


def _take(names: list[str], wanted: int, folder: Path, waiting: Callable[[], None]) -> dict[str, int]:
    """`wanted` of the GPUs, each with the open file that holds its lock."""
    said = False
    while True:
        taken: dict[str, int] = {}
        for name in names:
            file = os.open(folder / name.replace("/", "_"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                continue
            taken[name] = file
            if len(taken) == wanted:
                return taken
        for file in taken.values():  # another training may need just these
            os.close(file)
        if not said:
            log.info("waiting for %d free GPUs of %d", wanted, len(names))
            said = True
        waiting()
        time.sleep(SECONDS)
