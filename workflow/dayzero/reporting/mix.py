"""The report's table of a mix of sources: how much each run drew from each."""

from __future__ import annotations

from collections.abc import Sequence

from dayzero.reporting.collect import Run
from dayzero.reporting.facts import Table, number


def mix_table(runs: Sequence[Run]) -> Table:
    """A row for each source of every run that drew its samples by weight; no rows where none did."""
    rows = [
        [run.name, part["source"], f"{100 * part['share']:.2f} %", number(part["samples"]), number(part["passes"], 2)]
        for run in runs
        for part in (run.train or {}).get("mix") or []
    ]
    return Table(["run", "source", "share", "samples", "passes"], rows, frozenset({2, 3, 4}))
