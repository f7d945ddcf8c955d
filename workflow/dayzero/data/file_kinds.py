"""Which files of a source hold rows, and what kind of file each is, by its name."""

from __future__ import annotations

import os
import re
from itertools import takewhile
from pathlib import Path

from dayzero.console import log
from dayzero.errors import DataError
from dayzero.source import files_below, is_hidden, is_pattern, partner

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".idx": "megatron",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What `datasets` writes beside the rows of a data set that it saves, and hub repositories hold beside theirs."""
_ABOUT = re.compile(
    r"(readme|licen[cs]e|notice|copying|copyright|citation|authors|contributing|changelog|code_of_conduct|security)s?"
    r"([._-].*)?",
    re.IGNORECASE,
)
"""Names of what people write about a data set: no rows, where the ending is none of a table."""
SHOWN = 20
"""Files left out of a folder that are named in the log."""


def data_files(path: Path, label: str) -> list[tuple[Path, str]]:
    """The data files of a file or directory (recursively, sorted) with their names; raises DataError if none."""
    if path.is_file():
        return [(path, label)]
    pattern = is_pattern(label)  # which has matched hidden files only where it says so
    if partner(Path(label)) and not pattern:  # a directory that holds no more than the pair
        return [(p, label) for p in path.iterdir() if p.suffix == ".idx"]
    files = [p for p in files_below(path) if (pattern or not is_hidden(p.relative_to(path))) and p.name not in NOT_ROWS]
    kinds = {p: kind for p in files if p.is_file() and (kind := file_kind(p))}
    read = [p for p, kind in kinds.items() if kind != "text" or not _ABOUT.fullmatch(p.name)]
    tables = [p for p in read if kinds[p] != "text"]
    _name_left_out(label, path, files, tables or read)
    if not read:
        raise DataError(
            f"{label}: no data file in the directory: name one, or convert it to a known ending ({endings()})"
        )
    folder = _leading(label) if pattern else f"{label}/"
    return [(p, f"{folder}{p.relative_to(path)}") for p in tables or read]


def _leading(pattern: str) -> str:
    """What a glob begins with that its matches lack where they are collected: the root, or the way up."""
    parts = takewhile(lambda part: part in ("..", os.sep), Path(os.path.expanduser(pattern)).parts)
    return "".join(part if part == os.sep else part + os.sep for part in parts)


def _name_left_out(label: str, path: Path, files: list[Path], read: list[Path]) -> None:
    """Warn of the files of a folder that are not read, texts beside tables among them: they could have been meant."""
    known = {*read, *(partner(p) for p in read)}
    if others := [str(p.relative_to(path)) for p in files if p not in known]:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        log.warning(
            "WARNING: %s: %d files of the directory are not read as data: %s%s (name a file as the source if it is)",
            label, len(others), ", ".join(others[:SHOWN]), more,
        )  # fmt: skip


def file_kind(path: Path) -> str | None:
    """How a file is read, by its ending; None for one that is not known."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None


def endings() -> str:
    """The known endings, for messages."""
    return ", ".join(KINDS) + ", text also with .gz, .bz2, .xz or .zst (Parquet compresses itself)"
