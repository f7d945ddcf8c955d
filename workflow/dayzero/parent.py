"""Processes that end with the one that started them, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time


def end_with_parent(parent: int) -> None:
    """End this process (SIGKILL) as soon as its parent, the process `parent`, is gone; it may be gone already."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # prctl(2)
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        _end_without(parent)  # gone before that
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _end_without(parent: int) -> None:
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    while True:
        _end_without(parent)
        time.sleep(1)
