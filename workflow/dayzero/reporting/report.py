"""All files of a report."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from dayzero.errors import DataError
from dayzero.reporting.collect import Run
from dayzero.reporting.latex import latex_table
from dayzero.reporting.page import render_page
from dayzero.reporting.plots import PLOTS
from dayzero.reporting.scores import score_table, tidy_scores
from dayzero.reporting.style import plot_style, save, svg_for_page


def write_report(experiment: str, description: str, runs: Sequence[Run], directory: Path) -> None:
    """Write index.html, results.csv, results.tex and the plots into `directory`; the same runs give the same bytes.

    Raises DataError when two runs have the same name: their rows could not be told apart.
    """
    names = [run.name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"runs {', '.join(sorted(twice))} were given more than once: name every run once")
    scores = tidy_scores(experiment, runs)
    table = score_table(scores)
    scores.to_csv(directory / "results.csv", index=False, lineterminator="\n")
    (directory / "results.tex").write_text(latex_table(experiment, table), encoding="utf-8")
    plots = {}
    for name, (title, draw) in PLOTS.items():
        with plot_style(name):
            figure = draw(runs, scores)
            save(figure, directory, name)
            plots[name] = (title, svg_for_page(figure, name, escape(f"{title}: {', '.join(names)}")))
    page = render_page(experiment, description, runs, table, plots)
    (directory / "index.html").write_text(page, encoding="utf-8")
