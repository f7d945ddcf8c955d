"""Where things that are made once and used by many runs of a user lie."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """dayzero's folder in the user's cache, `~/.cache` or what XDG_CACHE_HOME names; perhaps not there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dayzero"
