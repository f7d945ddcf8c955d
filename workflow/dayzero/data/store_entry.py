"""One folder of the store being made: a lock around it, a place to work in, and what its sources were last time."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dayzero.console import log
from dayzero.files import atomic_directory, read_json, sha256_json, umask, write_json

Make = Callable[[Path, Path, "Memory"], dict[str, Any]]


def make_entry(output: Path, spec: dict[str, Any], make: Make) -> dict[str, Any]:
    """Make `output` whole or not at all, by one process at a time; returns its manifest.

    `make(folder, workspace, memory)` fills `folder`, which becomes `output` together with the manifest it returns, and
    may leave downloads in `workspace`. A process that had to wait uses what the other one made of the same `spec`.
    """
    output = output.absolute()
    manifest_file = output / "manifest.json"
    wanted = sha256_json(spec)
    before = _stamp(manifest_file)
    with _lock(output):
        if _stamp(manifest_file) not in (None, before):
            manifest = read_json(manifest_file)
            if manifest.get("spec_sha256") == wanted:
                log.info("%s was finished by another process meanwhile", output)
                return manifest
        _remove_leftovers(output)
        memory = Memory(output)
        with _workspace(output) as workspace, atomic_directory(output) as folder:
            manifest = {**make(folder, workspace, memory), "spec_sha256": wanted}
            write_json(folder / "manifest.json", manifest)
            _readable_as_usual(folder)
        memory.save()
        return manifest


class Memory:
    """What each source was (a commit or a SHA-256) when it was last fetched for an entry.

    The note lies beside the entry, whose own files are replaced as a whole; it is written when the entry is complete.
    """

    def __init__(self, output: Path) -> None:
        self._file = output.parent / f".{output.name}.sources.json"
        self._last: dict[str, str] = read_json(self._file) if self._file.is_file() else {}
        self._now: dict[str, str] = {}

    def moved_from(self, source: str, identity: str, pinned: bool) -> str | None:
        """What `source` was last time if that was something else than `identity`; warns then."""
        self._now[source] = identity
        last = self._last.get(source)
        if last in (None, identity):
            return None
        advice = "" if pinned else ": pin the revision or the sha256 to keep results comparable"
        log.warning("WARNING: %s has moved since it was last fetched, from %s to %s%s", source, last, identity, advice)
        return last

    def save(self) -> None:
        """Remember what was seen."""
        if self._last != {**self._last, **self._now}:
            write_json(self._file, {**self._last, **self._now})


@contextmanager
def _lock(output: Path) -> Iterator[None]:
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output.parent / f".{output.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process is fetching %s; waiting for it", output)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _workspace(output: Path) -> Iterator[Path]:
    workspace = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp"))
    try:
        yield workspace
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _readable_as_usual(folder: Path) -> None:
    """Give the files the user's usual mode: safetensors writes them for the owner alone."""
    for file in folder.rglob("*"):
        if file.is_file() and file.stat().st_nlink == 1:
            file.chmod(0o666 & ~umask())


def _remove_leftovers(output: Path) -> None:
    """Delete what a killed process left; nobody else works here while we hold the lock."""
    for suffix in ("tmp", "old"):
        for leftover in output.parent.glob(f".{output.name}.*.{suffix}"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns
