"""GPUs shared out among what runs side by side: grouped small runs in one allocation, or all jobs on one machine.

Each sees all GPUs there, and each would take the first. So a stage locks as many as it uses, in files of this machine,
and shows what it starts no others. The system frees a lock with the process that held it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dayzero.console import log
from dayzero.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
SECONDS = 2.0
"""Between two looks for free GPUs."""


@contextmanager
def own_gpus(wanted: int, job_id: str | None = None, folder: Path | None = None) -> Iterator[list[str]]:
    """Inside the block `CUDA_VISIBLE_DEVICES` names `wanted` GPUs that nothing else has that asked here.

    They are shared out within the SLURM job `job_id` (None: the present one), and outside of SLURM among all that the
    user runs on the machine. Waits while too few are free. To be called before CUDA is used. Yields their names; where
    there are fewer than `wanted`, or none at all, nothing is changed.

    Raises:
        ConfigError: the folder of the locks belongs to somebody else.
    """
    before = os.environ.get(VISIBLE)
    there = [name for name in before.split(",") if name] if before is not None else _counted()
    if len(there) < wanted or not there:
        yield there
        return
    locks = _folder(folder or Path(tempfile.gettempdir()), job_id or os.environ.get("SLURM_JOB_ID") or "local")
    taken = _take(there, wanted, locks)
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


def _counted() -> list[str]:
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _folder(parent: Path, job_id: str) -> Path:
    path = parent / f"dayzero-gpus-{os.getuid()}-{job_id}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ConfigError(f"{path} belongs to somebody else: remove it, or set TMPDIR to a folder of your own")
    return path


def _take(names: list[str], wanted: int, folder: Path) -> dict[str, int]:
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
        time.sleep(SECONDS)
