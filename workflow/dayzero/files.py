"""Files that are either complete or absent: write beside the target, sync, rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dayzero.errors import ConfigError, DataError, one_line


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; it becomes `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        temporary.chmod(0o666 & ~umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; it replaces `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    temporary.chmod(0o777 & ~umask())
    try:
        yield temporary
        if path.is_dir() and not path.is_symlink():
            # rename() cannot replace a directory that is not empty: move the old one aside first
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused (they are not JSON)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raises DataError where it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}): delete it, or what made it, and run that again") from error


def read_json_lines(path: str | Path, *, growing: bool = False) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none where there is no file. Raises DataError naming a line that is none.

    `growing`: it is being written, or its writer was killed, so that half a line at its end is left out.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    if growing and lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json_object(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def json_object(text: str, where: object) -> dict[str, Any]:
    """The JSON object that a stage wrote as `text`. Raises DataError where it is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON ({error.msg}): remove it and run its stage again") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} holds no JSON object: remove it and run its stage again")
    return value


def check_folder(directory: str | Path) -> None:
    """Raise ConfigError where `directory` is, or would lie below, something that is not a folder."""
    for path in (Path(directory), *Path(directory).parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is not a folder: set results_dir to one")


def check_writable(directory: str | Path) -> None:
    """Raise ConfigError where no file can be made in `directory` (which need not exist yet)."""
    check_folder(directory)
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        error.filename = str(directory)  # not that of the file tried there
        raise ConfigError(one_line(error)) from error


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON text that is the same for equal values: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def umask() -> int:
    """The mode bits that this user's new files lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
