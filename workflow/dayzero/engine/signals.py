"""SIGTERM, SIGUSR1 and SIGINT ask training to stop at the end of its step, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


_early: list[int] = []


def note_early() -> None:
    """From now on a request to stop is only noted, for the `StopRequest` that comes: while a model is still loaded."""
    for s in SIGNALS:
        signal.signal(s, lambda number, _: _early.append(number))


class StopRequest:
    """While active, the first signal is only noted in `asked`; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.asked = bool(_early)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
