"""Rows that break their format or cannot be encoded, set aside where `data.on_bad_row` is reject."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, TextIO

from dayzero.console import log
from dayzero.files import sha256_file

SHOWN = 20
"""Rejected rows that are named in the log, one line each; the file names all."""


class Rejects:
    """Writes a line `{origin, reason, row}` for each row; the file is made with the first one."""

    def __init__(self, file: Path) -> None:
        self._file, self.count = file, 0
        self._handle: TextIO | None = None
        self._sources: Counter[str] = Counter()

    def add(self, origin: str, reason: str, row: Any) -> None:
        """Set one row aside; `row` is what could be read of it, or its text."""
        if self._handle is None:
            self._handle = open(self._file, "w", encoding="utf-8")  # noqa: SIM115  closed by close
        self._handle.write(json.dumps({"origin": origin, "reason": reason, "row": row}, default=str) + "\n")
        self.count += 1
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
