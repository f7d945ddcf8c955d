"""What readers yield: rows, and in the place of one that cannot be read, while those after it can, what is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from dayzero.data.rows import Row

_ESCAPED = re.compile("[\udc80-\udcff]")
"""What Python's surrogateescape makes of bytes that are no UTF-8, and no UTF-8 decodes to."""


class BadRow(NamedTuple):
    """A row that cannot be read while those after it can."""

    reason: str
    content: Any


Parsed = Iterator[tuple[str, "Row | BadRow"]]
"""(origin, row) of each row of a file."""


def not_utf8(text: str) -> BadRow | None:
    """What is wrong with a row whose bytes could not all be decoded; None for any other."""
    if text.isascii() or not _ESCAPED.search(text):
        return None
    content = text.encode("utf-8", "surrogateescape")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text ({error.reason} at byte {error.start + 1} of the row): convert it to UTF-8"
        return BadRow(reason, content.decode("utf-8", "replace"))
    return None
