"""Print the score table of a report in the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dayzero.reporting.scores import ScoreTable, score_table

MAX_RUNS_ACROSS = 5
"""With more runs than this they become the rows, so that the table still fits a terminal."""


def terminal_table(table: ScoreTable, title: str) -> Table:
    """Metrics down and runs across (or the other way round for many runs), the best value of a metric in bold."""
    names = [
        [escape(f"{column.task} ({table.tasks[column.task]})"), f"{escape(column.metric)} {column.arrow}"]
        for column in table.columns
    ]
    cells = [
        [
            f"[bold green]{cell.text}[/]" if cell.best else cell.text + ("" if cell.comparable else " †")
            for cell in column.cells
        ]
        for column in table.columns
    ]
    shown = Table(title=title, title_justify="left", title_style="bold")
    if len(table.runs) <= MAX_RUNS_ACROSS:
        shown.add_column("task")
        shown.add_column("metric")
        for run in table.runs:
            shown.add_column(escape(run), justify="right", no_wrap=True)
        previous = None
        for (task, metric), values in zip(names, cells, strict=True):
            shown.add_row("" if task == previous else task, metric, *values)
            previous = task
    else:
        shown.add_column("run")
        for task, metric in names:
            shown.add_column(f"{task}\n{metric}", justify="right")
        for row, run in enumerate(table.runs):
            shown.add_row(escape(run), *(values[row] for values in cells))
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and where the whole report lies; 1 with one line when there is none."""
    parser = argparse.ArgumentParser(prog="dayzero.reporting.table", description=__doc__)
    parser.add_argument("results", type=Path, help="a report's results.csv")
    path = parser.parse_args(argv).results
    try:
        scores = pd.read_csv(
            path,
            dtype={"run": str, "task": str, "metric": str, "experiment": str},
            keep_default_na=False,
            na_values=[""],
        )
        table = score_table(scores)
    except (OSError, KeyError, ValueError) as error:
        print(
            f"error: {path} is not a report's results.csv ({error}): make the report first: make demo", file=sys.stderr
        )
        return 1
    console = Console(width=None if sys.stdout.isatty() else 160)
    if table.columns:
        experiment = escape(str(scores["experiment"].iloc[0]))
        console.print(terminal_table(table, f"{experiment}: held-out scores ± standard error"))
        for note in table.incomparable:
            console.print(f"† {note}", markup=False)
    else:
        console.print("No run was evaluated: the experiment has no tasks.")
    print(f"report: {path.with_name('index.html')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
