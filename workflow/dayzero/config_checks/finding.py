"""What a check finds."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """What is wrong at which dotted key."""

    key: str
    message: str
