"""What a stage says: one log for terminal and file, and one progress bar for every long step."""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("dayzero")
console = Console(stderr=True)
T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15
"""Without a terminal a progress bar becomes a log line at most this often."""


STARTED_AGAIN = ("train",)
"""Stages whose every start in a SLURM job keeps a log of its own."""
OWN_LOG = "DAYZERO_OWN_LOG"
"""Environment variable: the log of this start, for the processes that it starts."""


def setup_logging(stage: str, log_file: str | Path | None = None) -> None:
    """Send the `dayzero` log to stderr and, with full detail and times, to `log_file`."""
    log.setLevel(logging.DEBUG)
    log.handlers.clear()
    log.propagate = False
    logging.raiseExceptions = False  # a log file on a full disk: the error that matters is the stage's own
    terminal: logging.Handler
    if console.is_terminal:
        terminal = RichHandler(console=console, show_path=False, show_time=False, show_level=False, markup=False)
    else:
        terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.INFO)
    terminal.setFormatter(logging.Formatter(f"{stage}: %(message)s"))
    log.addHandler(terminal)
    if log_file:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        own = _own_log(Path(log_file)) if stage in STARTED_AGAIN else None
        to_file: list[logging.Handler] = [_Reopened(log_file, own)]
        to_file += [logging.FileHandler(own, encoding="utf-8")] if own else []
        for handler in to_file:
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            log.addHandler(handler)
            logging.getLogger().addHandler(handler)  # the libraries' warnings belong in the file too
    logging.captureWarnings(True)
    # torchao still registers enums as constants, which torch 2.13 calls deprecated: not for a user to mend
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    # imported by transformers and peft, it warns of each kernel that needs a GPU this machine lacks
    logging.getLogger("torchao").setLevel(logging.ERROR)


class _Reopened(logging.handlers.WatchedFileHandler):
    """Writes to the file of that name, also when another start of the stage has removed it and made its own.

    While it is the very file `own` it writes nothing: what is written there is written here.
    """

    def __init__(self, log_file: str | Path, own: Path | None) -> None:
        super().__init__(log_file, encoding="utf-8")
        self.own = own

    def emit(self, record: logging.LogRecord) -> None:
        try:
            same = self.own is not None and os.path.samefile(self.baseFilename, self.own)
        except OSError:
            same = False
        if same:
            return
        try:
            super().emit(record)
        except OSError:  # its folder is gone, say: no reason to end a training
            self.handleError(record)


def _own_log(log_file: Path) -> Path | None:
    """{stage}-{job}-{start}.log beside the log of a stage in a SLURM job, a second name of the same file.

    Snakemake removes the log before each start, a requeued one and one that is refused too: what an earlier or a live
    one says stays under that name. None without a job, or where the file system has no hard links.
    """
    if given := os.environ.get(OWN_LOG):
        return Path(given) if Path(given).parent == log_file.resolve().parent else None
    if not (job := os.environ.get("SLURM_JOB_ID")):
        return None
    log_file.touch()
    for start in range(1000):
        own = log_file.resolve().with_name(f"{log_file.stem}-{job}-{start}.log")
        try:
            os.link(log_file, own)
        except FileExistsError:
            continue
        except OSError:
            return None
        os.environ[OWN_LOG] = str(own)
        return own
    return None


class ProgressBar:
    """A bar with step/total, free fields (loss, tokens/s) and the time left; log lines where there is no terminal.

    Use as a context manager. `total` may be None when unknown.
    """

    def __init__(self, description: str, total: int | None, *, initial: int = 0, enabled: bool = True) -> None:
        self.description, self.total, self.done, self.initial = description, total, initial, initial
        self.enabled = enabled
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[info]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(description, total=total, completed=initial, info="")

    def __enter__(self) -> ProgressBar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, n: int = 1, **fields: Any) -> None:
        """Count `n` more done and show `fields` (name=value) beside the bar."""
        self.done += n
        if not self.enabled:
            return
        info = "  ".join(f"{k} {_short(v)}" for k, v in fields.items())
        if self._bar:
            self._bar.update(self._task, advance=n, info=info)
            return
        now = time.monotonic()
        if self.done == self.total or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            log.info("%s %s/%s  %s  %s", self.description, self.done, self.total or "?", info, self._time_left(now))

    def _time_left(self, now: float) -> str:
        done = self.done - self.initial
        if not self.total or not done:
            return ""
        return f"{(now - self._started) / done * (self.total - self.done):.0f} s left"


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` behind a progress bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with ProgressBar(description, total) as bar:
        for item in items:
            yield item
            bar.advance()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
