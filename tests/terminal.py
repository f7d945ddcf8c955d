"""Processes as a terminal starts them."""

from __future__ import annotations

import sys

_HEEDING = """import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""


def heeding_signals(*arguments: str) -> list[str]:
    """The command of a Python that heeds them all: whatever starts the tests may ignore some, which is inherited."""
    return [sys.executable, "-c", _HEEDING, *arguments]
