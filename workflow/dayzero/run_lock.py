"""At most one training of a run: a lock file in the run's folder that says whose it is and shows a sign of life.

All times compared here are the file server's (modification times in the same folder), so that the clocks of login and
compute nodes need not agree.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from dayzero import slurm
from dayzero.console import log
from dayzero.errors import ConfigError, DataError

LOCK = "lock.json"
UNSEEN_BEATS = 3
"""Signs of life that the holder must have missed, where the queue does not show its job."""


class RunHeld(ConfigError):
    """Another process trains this run."""


class RunLock:
    """Held inside the `with` block. Raises `RunHeld`, naming the holder, when another process shows signs of life.

    A lock is taken over when its job has left the queue or its process is gone, or else after `stale_after` seconds
    without a sign of life; `beat` seconds lie between two of those.
    """

    def __init__(self, folder: Path, *, job: slurm.Job | None, beat: float = 15, stale_after: float = 120) -> None:
        self.path, self.beat, self.stale_after = folder / LOCK, beat, stale_after
        process = psutil.Process()
        self.content: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": process.pid,
            "process_started": process.create_time(),
            "job": job.name if job else None,
            "job_id": job.job_id if job else None,
            "restarts": job.restarts if job else 0,
            "nodes": job.nodes if job else None,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.last_sign: float | None = None
        """When the holder of a lock that was taken over last showed a sign of life."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            self._remove_stale()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()
        if self._is_ours():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the file with its content in one step; False where there is one."""
        text = json.dumps(self.content, indent=2) + "\n"
        temporary = self.path.with_name(f".{LOCK}.{self.content['token']}")
        try:
            temporary.write_text(text)
        except OSError as error:
            error.filename = str(self.path.parent)  # the remedy is the folder's
            raise
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with open(self.path, "x", encoding="utf-8") as f:
                    f.write(text)
            except FileExistsError:
                return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _remove_stale(self) -> None:
        """Remove a lock nobody holds, once that is sure. Raises `RunHeld`."""
        holder = read_lock(self.path.parent)
        if holder is None:
            return
        reason = self._gone(holder) or self._wait_for_a_sign(holder)
        if read_lock(self.path.parent) != holder:  # another process was faster
            return
        aside = self.path.with_name(f".{LOCK}.{self.content['token']}.stale")
        with suppress(FileNotFoundError):
            os.rename(self.path, aside)
            if _parsed(aside.read_text()) != holder:  # faster still
                os.rename(aside, self.path)
                return
            self.last_sign = aside.stat().st_mtime
            aside.unlink()
            log.warning("took over the lock of %s: %s", describe(holder), reason)

    def _gone(self, holder: dict[str, Any]) -> str | None:
        """Why the holder cannot be alive; None where that cannot be told."""
        ours = self.content
        if holder["job_id"] and holder["job_id"] == ours["job_id"] and holder["restarts"] < ours["restarts"]:
            return "it was put back into the queue and is this job"
        if holder["job_id"]:
            states = slurm.job_states([holder["job_id"]])
            state = None if states is None else states.get(holder["job_id"])
            if state is not None and state not in slurm.ALIVE:
                return f"that job is {state}"
            # a queue may hide others' jobs, or be another cluster's: not to be seen there is no proof by itself
            if states is not None and state is None and self._silent_for(UNSEEN_BEATS * self.beat):
                return "that job is gone from the queue"
        if holder["host"] == ours["host"] and not _runs(holder["pid"], holder["process_started"]):
            return "that process has ended"
        return None

    def _wait_for_a_sign(self, holder: dict[str, Any]) -> str:
        first, asked = self._modified(), time.monotonic()
        while first is not None:
            age = self._server_time() - first
            if age > self.stale_after:
                return f"no sign of life for {age:.0f} s"
            time.sleep(min(1.0, self.beat / 3))
            now = self._modified()
            if now is None:
                break
            if now != first:
                holder = read_lock(self.path.parent) or holder  # another may have taken it over meanwhile
                whose = f"scancel {job_name(holder)}" if holder["job_id"] else f"kill {holder['pid']} on its host"
                raise RunHeld(
                    f"{self.path.parent} is being trained by {describe(holder)}: wait for it, or end it ({whose}); its "
                    f"lock {self.path} is taken over {self.stale_after:.0f} s after its last sign of life"
                )
            if time.monotonic() - asked >= self.beat:  # the queue is the whole cluster's: not at every look
                asked = time.monotonic()
                if reason := self._gone(holder):
                    return reason
        return "it has just been released"

    def _silent_for(self, seconds: float) -> bool:
        last = self._modified()
        return last is not None and self._server_time() - last > seconds

    def _modified(self) -> float | None:
        try:
            return self.path.stat().st_mtime
        except FileNotFoundError:
            return None

    def _server_time(self) -> float:
        """The file server's clock: the time it gives a file written now."""
        probe = self.path.with_name(f".{LOCK}.{self.content['token']}.time")
        probe.write_text("")
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _is_ours(self) -> bool | None:
        """None where there is no lock."""
        try:
            holder = read_lock(self.path.parent)
        except DataError:
            return False
        return None if holder is None else holder["token"] == self.content["token"]

    def _beat(self) -> None:
        missing = False
        while not self._stop.wait(self.beat):
            with suppress(OSError):  # a file server that does not answer for a while
                ours = self._is_ours()
                if ours:
                    os.utime(self.path)
                elif ours is False or missing:
                    log.error("error: lost the lock %s to another process: stopping with a checkpoint", self.path)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                missing = ours is None  # perhaps only for a moment, see _remove_stale


def read_lock(folder: Path) -> dict[str, Any] | None:
    """What the lock in a run's train folder says; None where there is none."""
    for _ in range(10):
        try:
            holder = _parsed((folder / LOCK).read_text())
        except FileNotFoundError:
            return None
        if holder is not None:
            return holder
        time.sleep(0.1)  # just being written
    raise DataError(f"{folder / LOCK} is spoilt: delete it when no training of this run is under way")


def _parsed(text: str) -> dict[str, Any] | None:
    """What a whole lock says; None for one that is just being written, or spoilt."""
    with suppress(json.JSONDecodeError):
        content = json.loads(text)
        if isinstance(content, dict) and "token" in content:
            return content
    return None


def job_name(holder: dict[str, Any]) -> str:
    """What SLURM's commands call the holder's job (empty: none); `scancel` of a task's `job_id` may end its array."""
    return str(holder.get("job") or holder["job_id"] or "")  # a lock of an older version has no name


def describe(holder: dict[str, Any]) -> str:
    """A holder in words."""
    job = f"SLURM job {job_name(holder)} on {holder['nodes'] or holder['host']}, " if holder["job_id"] else ""
    return f"{job}process {holder['pid']} of {holder['host']} since {holder['since']}"


def _runs(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
