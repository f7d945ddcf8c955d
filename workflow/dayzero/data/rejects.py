"""Rows that break their format or cannot be encoded, set aside where `data.on_bad_row` is reject."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from dayzero.console import log
from dayzero.files import sha256_file

SHOWN = 20
"""Rejected rows that are named in the log, one line each; the file names all."""


_ASIDE = re.compile(r",? or,?(?: where other rows have it,)? set such (?:row|one)s aside \(data\.on_bad_row: reject\)$")
"""The remedy that a row which is set aside has had."""


class Rejects:
    """Writes a line `{origin, reason, row}` for each row; the file is made with the first one."""

    def __init__(self, file: Path) -> None:
        self._file, self.count = file, 0
        self.first = ""
        """What was wrong with which row, of the first one since this was last emptied."""
        self._handle: TextIO | None = None
        self._sources: Counter[str] = Counter()

    def add(self, origin: str, reason: str, row: Any) -> None:
        """Set one row aside; `row` is what could be read of it, or its text."""
        reason = _ASIDE.sub("", reason)
        if self._handle is None:
            self._handle = open(self._file, "w", encoding="utf-8")  # noqa: SIM115  closed by close
        self._handle.write(json.dumps({"origin": origin, "reason": reason, "row": row}, default=_plain) + "\n")
        self.count += 1
        self.first = self.first or f"{origin}: {reason}"
        self._sources[origin.rpartition(":")[0]] += 1
        if self.count <= SHOWN:
            log.warning("rejected %s: %s", origin, reason)

    def close(self) -> dict[str, Any]:
        """What the manifest says: how many, of which files, and where they are."""
        if self._handle is None:
            return {"rows": 0}
        self._handle.close()
        log.warning("WARNING: %d rows are set aside in %s", self.count, self._file.name)
        sha256 = sha256_file(self._file)
        return {"rows": self.count, "file": self._file.name, "by_file": dict(self._sources), "sha256": sha256}


def _plain(value: Any) -> Any:
    """A value that JSON has no word for: an array is the list of its numbers, anything else is told by its text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
