"""The report's tables of a mix of sources: what each became in tokens, and how much each run drew from each."""

from __future__ import annotations

from collections.abc import Sequence

from dayzero.reporting.collect import Run
from dayzero.reporting.facts import Table, by_key, number, used_by


def mix_table(runs: Sequence[Run]) -> Table:
    """A row for each source of every run that drew its samples by weight; no rows where none did."""
    rows = [
        [run.name, part["source"], f"{100 * part['share']:.2f} %", number(part["samples"]), number(part["passes"], 2)]
        for run in runs
        for part in (run.train or {}).get("mix") or []
    ]
    return Table(["run", "source", "share", "samples", "passes"], rows, frozenset({2, 3, 4}))


def source_tokens_table(runs: Sequence[Run]) -> Table:
    """A row for each source of training tokens that are packed by source; no rows where none are."""
    rows = []
    for key, users in by_key(runs, "tokenize").items():
        counted = ((users[0].tokens or {}).get("splits") or {}).get("train", {}).get("sources") or []
        sources = (users[0].data or {}).get("sources") or []  # those of the other splits come after them
        for source, entry in zip(sources, counted, strict=False):
            counts = [number(entry.get(name)) for name in ("rows", "documents", "tokens")]
            rows.append([used_by(key, users, runs), source.get("source") or "", *counts])
    return Table(["tokens", "source", "rows", "documents", "tokens"], rows, frozenset({2, 3, 4}))
