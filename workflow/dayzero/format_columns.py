"""The columns that each format of rows reads, by the format's own names: the check of the config and the readers agree
on them here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NamedTuple

from dayzero.errors import ConfigError


class Columns(NamedTuple):
    """Of one format."""

    needs: tuple[str, ...]
    """Columns that a row must have, by which the format is told."""
    may_have: tuple[str, ...] = ()
    """Columns that are read where they are there."""


COLUMNS = {
    "messages": Columns(("messages",), ("system", "tools")),
    "sharegpt": Columns(("conversations",), ("system", "tools")),
    "pretokenized": Columns(("input_ids",), ("labels", "loss_mask", "attention_mask")),
    "alpaca": Columns(("instruction", "output"), ("input", "system", "history", "tools")),
    "squad": Columns(("context", "question", "answers")),
    "multiple_choice": Columns(("question", "choices", "answer")),
    "prompt_completion": Columns(("prompt", "completion")),
    "text": Columns(("text",)),
}
"""By name, the most telling columns first: the order in which a row's format is looked for."""


def check_columns(format_name: str, columns: Mapping[str, str]) -> None:
    """Raise ConfigError when `columns` renames something that the format, or with `auto` every one, does not read."""
    of_format = COLUMNS.values() if format_name == "auto" else [COLUMNS[format_name]]
    known = [*dict.fromkeys(name for those in of_format for name in (*those.needs, *those.may_have)), "id"]
    for name in columns:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            of, they = ("any format", "they have") if format_name == "auto" else (format_name, "it has")
            raise ConfigError(f"data.columns: {name!r} is not a column of {of}{hint}: {they} {', '.join(known)}")
