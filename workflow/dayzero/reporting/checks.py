"""The report's tables of the data report: what rows are like, and which items of the evaluation stand among them."""

from __future__ import annotations

from collections.abc import Sequence

from dayzero.reporting.collect import Record, Run
from dayzero.reporting.facts import DASH, Table, by_key, number, used_by


def checks_tables(runs: Sequence[Run]) -> list[tuple[str, Table, Table, Table]]:
    """(title, rows, contamination, the worst items of it) for each data report."""
    tables = []
    for key, users in by_key(runs, "check_data").items():
        check = users[0].check
        if check is None:
            continue
        rows = [
            [
                split,
                number(entry["rows"]),
                number(entry["empty_answers"]),
                _found(entry["exact_duplicates"]),
                _found(entry["near_duplicates"]),
                number(round(entry["characters"]["total"] / max(entry["rows"], 1))),
                number(entry["characters"]["longest"]),
                ", ".join(f"{name} {number(n)}" for name, n in list(entry["languages"].items())[:4]) or DASH,
            ]
            for split, entry in check["splits"].items()
        ]
        header = ["split", "rows", "blank answers", "copies", "near-duplicates", "mean characters", "longest"]
        contamination = check["contamination"]
        items = [
            [task, number(entry["items"]), _found(entry, "contaminated", "items"), number(entry["too_short"])]
            for task, entry in contamination["tasks"].items()
        ]
        worst = [
            [task, number(item["item"]), f"{100 * item['overlap']:.0f} %", _place(item), item["text"]]
            for task, entry in contamination["tasks"].items()
            for item in entry["worst"]
        ]
        found = f"with {100 * contamination['overlap']:g} % of their {contamination['ngram']}-grams in training rows"
        found += " (shorter items: all of it)"
        tables.append(
            (
                used_by(key, users, runs),
                Table([*header, "languages of a sample"], rows, frozenset(range(1, 7))),
                Table(["task", "items", found, "too short to tell"], items, frozenset({1, 2, 3})),
                Table(["task", "item", "overlap", "training row", "text"], worst, frozenset({1, 2})),
            )
        )
    return tables


def _found(entry: Record, found: str = "found", of: str = "looked_at") -> str:
    looked_at = f" of {number(entry[of])}" if of != "items" else ""
    return f"{number(entry[found])}{looked_at} ({100 * entry['share']:.1f} %)"


def _place(item: Record) -> str:
    """File and line of the training row that holds the item; reports of earlier versions have its number alone."""
    return item.get("origin") or f"row {number(item['train_row'])}"
