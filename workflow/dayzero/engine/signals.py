"""SIGTERM, SIGUSR1 and SIGINT ask training to stop at the end of its step, with a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

STOP_ASKED = "DAYZERO_STOP_ASKED"
"""Environment variable: this process was started by one that had been asked to stop already."""

_early: list[int] = []


def note_early(signals: Sequence[signal.Signals] = SIGNALS) -> None:
    """From now on a request to stop is only noted, for the `StopRequest` that comes: while a model is still loaded."""
    if os.environ.get(STOP_ASKED):
        _early.append(signal.SIGUSR1)
    for s in signals:
        signal.signal(s, lambda number, _: _early.append(number))


def noted() -> list[int]:
    """The requests that came while nothing but `note_early` heeded them."""
    return list(_early)


def never_ended_by_a_stop(main: Callable[[], int], signals: Sequence[signal.Signals] = SIGNALS) -> int:
    """What the `main` of a process returns, in which a request to stop is noted from the start and ends nothing.

    Once `main` is over there is nothing left to stop, but Python goes back to the signals' default, death, before it
    takes its modules down: a training that had done all its work would have failed.
    """
    note_early(signals)
    try:
        return main()
    finally:
        for s in signals:
            signal.signal(s, signal.SIG_IGN)


class StopRequest:
    """While active, the first signal is only noted in `asked`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.asked = bool(_early)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        self.asked = self.asked or bool(_early)
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
