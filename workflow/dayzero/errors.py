"""What a user did wrong, said so that it can be put right."""

from __future__ import annotations

import errno

from pydantic import ValidationError


class ConfigError(ValueError):
    """A configured value cannot be used. The message names the field, its value and the remedy, in one line."""


class DataError(ValueError):
    """A file or row cannot be used. The message names the file (and row) and the remedy, in one line."""


class Told(ValueError):
    """What went wrong is told in full already, by the process in which it did: a traceback of ours would hide that."""


def short(error: Exception | str, length: int = 160) -> str:
    """The beginning of what an error says, in one line."""
    return " ".join(str(error).split())[:length]


def one_line(error: Exception) -> str:
    """An error as its reader needs it: a user's mistake in its own words, trouble with the disk with its remedy, any
    other with its type."""
    message = " ".join(str(error).split())
    code = error.errno if isinstance(error, OSError) else None
    where = (error.filename if isinstance(error, OSError) else None) or "the results folder"
    if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in message:
        return f"no space left on the disk of {where}: free some, or set results_dir to a larger disk"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} does not exist: correct the path, or run the stage that makes it first"
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write {where}: make it writable, or set results_dir to a folder that is"
    if isinstance(error, ValidationError):
        found = {".".join(str(part) for part in e["loc"]): f"{e['input']!r}: {e['msg']}" for e in error.errors()}
        return "the config has " + "; ".join(f"{key} = {said}" for key, said in found.items())
    return message if isinstance(error, ValueError) and message else f"{type(error).__name__}: {message}"
