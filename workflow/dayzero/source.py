"""How a source is written, and what a local one means: `hf:org/name@revision`, a local path or glob, or
`package:NAME==VERSION/path/inside`.

The check of the config, the workflow's inputs and the stages that fetch all ask here, so that they agree.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dayzero.errors import ConfigError

FORMS = "`hf:org/name@revision`, a local path, or `package:NAME==VERSION/path/inside`"
_KINDS = ("hf", "package")
_HUB = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@(\S+))?")
_PACKAGE = re.compile(r"([A-Za-z0-9][\w.-]*==([^/=\s]+))/+([^/\s].*)")
_PREFIX = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+")
"""Of two characters at least: one is a Windows drive."""


@dataclass(frozen=True)
class Source:
    """A parsed source. `name`: `org/name`, `NAME==VERSION` or the local path; `inside`: path in the package."""

    text: str
    kind: Literal["hf", "local", "package"]
    name: str
    revision: str | None = None
    inside: str = ""

    @property
    def pinned(self) -> bool:
        """Whether the text itself names one unchanging content."""
        return self.kind == "package" or (
            self.kind == "hf" and bool(re.fullmatch(r"[0-9a-f]{40}", self.revision or ""))
        )


def parse_source(text: str, key: str) -> Source:
    """Parse a source; raises ConfigError naming the config `key`, the text and the remedy."""
    prefix, colon, rest = text.partition(":")
    if not text.strip():
        raise ConfigError(f"{key}: the source is empty: give {FORMS}")
    if colon and prefix == "hf":
        match = _HUB.fullmatch(rest)
        if not match:
            raise ConfigError(f"{key}: {text!r} is no hub source: write `hf:org/name` or `hf:org/name@revision`")
        return Source(text, "hf", match[1], match[2])
    if colon and prefix == "package":
        match = _PACKAGE.fullmatch(rest)
        if not match:
            raise ConfigError(f"{key}: {text!r} is no package source: write `package:NAME==VERSION/path/inside`")
        return Source(text, "package", match[1], match[2], match[3].rstrip("/"))
    if colon and _PREFIX.fullmatch(prefix) and not Path(text).exists():
        if rest.startswith("//"):
            raise ConfigError(f"{key}: {text!r} is a URL, which is not a source: download it and give its path")
        hint = difflib.get_close_matches(prefix, _KINDS, n=1, cutoff=0.4)
        also = f" (did you mean `{hint[0]}:`?)" if hint else ""
        raise ConfigError(f"{key}: unknown source {text!r}{also}: give {FORMS}")
    return Source(text, "local", text)


def listed(source: str | list[str] | None) -> list[str]:
    """One or several sources, or none, as a list."""
    return [source] if isinstance(source, str) else list(source or [])


def local_path(text: str) -> Path | None:
    """Where a local source lies, with `~` written out; None for a source of another kind."""
    return None if text.startswith(("hf:", "package:")) else Path(os.path.expanduser(text))


def is_pattern(text: str) -> bool:
    """Whether a local source is a glob: it has its signs, and no file is called so."""
    path = local_path(text)
    return path is not None and any(c in text for c in "*?[") and not path.exists()


def is_missing(text: str) -> bool:
    """Whether a local source names nothing that is there."""
    path = local_path(text)
    return path is not None and not path.exists() and not (is_pattern(text) and matches(path))


def local_files(text: str) -> list[str]:
    """The files that a local source means: of a folder all but hidden ones, both of a Megatron pair, a glob's matches.

    Of another kind of source none. A path where nothing is stands for itself, so that its absence is noticed.
    """
    path = local_path(text)
    if path is None:
        return []
    found = matches(path) if is_pattern(text) else _meant(path)
    return [str(file) for file in found or [path]]


def matches(pattern: Path) -> list[Path]:
    """The files that a glob means: those it matches, and all in the folders it matches but what is hidden there."""
    found = sorted(glob.glob(str(pattern), recursive=True))
    return list(dict.fromkeys(file for match in found for file in _meant(Path(match))))


def _meant(path: Path) -> list[Path]:
    if path.is_dir():
        return [p for p in files_below(path) if p.is_file() and not is_hidden(p.relative_to(path))]
    other = partner(path)
    return [path, other] if other and other.is_file() else [path]


def partner(path: Path) -> Path | None:
    """The other file of Megatron's .bin and .idx pair; None for any other file."""
    other = {".bin": ".idx", ".idx": ".bin"}.get(path.suffix)
    return path.with_suffix(other) if other else None


def is_hidden(path: Path) -> bool:
    """Whether a file, or a folder on the way to it, begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def files_below(folder: Path) -> list[Path]:
    """All that is in a folder and its folders, those that are links too, but folders themselves; sorted."""
    return sorted(_below(folder, frozenset()))


def _below(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:  # a link to a folder that it is in
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _below(path, above | {real})
        else:
            yield path
