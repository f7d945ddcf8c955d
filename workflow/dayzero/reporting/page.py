"""The report as one HTML file that loads nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dayzero import __version__
from dayzero.provenance import git_revision
from dayzero.reporting import facts
from dayzero.reporting.checks import checks_tables
from dayzero.reporting.collect import Run
from dayzero.reporting.jobs import jobs_table
from dayzero.reporting.mix import mix_table, source_tokens_table
from dayzero.reporting.scores import ScoreTable
from dayzero.reporting.style import COLOURS

DARK_COLOURS = ["#4aa8e0", "#f08a3c", "#2cc295", "#e29bc4", "#8fd0f5", "#f2bd4b", "#ab9be0"]
"""`COLOURS` lightened for a dark page, in the same order."""


def render_page(
    experiment: str,
    description: str,
    runs: Sequence[Run],
    table: ScoreTable,
    plots: Mapping[str, tuple[str, str]],
) -> str:
    """The page. `plots`: name -> (title, <svg> element made by `style.svg_for_page`); all other text is escaped."""
    environment = Environment(
        loader=PackageLoader("dayzero.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        experiment=experiment,
        description=description.strip(),
        run_names=[run.name for run in runs],
        models=list(dict.fromkeys(facts.short_source(run.model) for run in runs)),
        data=list(dict.fromkeys(run.keys["fetch_data"] for run in runs)),
        verdicts=[(run.name, run.parity["verdict"]) for run in runs if run.parity],
        table=table,
        plots={name: (title, Markup(svg)) for name, (title, svg) in plots.items()},  # noqa: S704 - made by matplotlib
        runs=facts.runs_table(runs),
        serving=facts.serving_table(runs),
        data_tables=facts.data_tables(runs),
        checks=checks_tables(runs),
        mix=mix_table(runs),
        tokens=facts.tokens_table(runs),
        source_tokens=source_tokens_table(runs),
        differences=facts.differences_table(runs),
        provenance=facts.provenance_tables(runs),
        packages=facts.packages_table(runs),
        jobs=jobs_table(runs),
        colours=COLOURS,
        dark_colours=DARK_COLOURS,
        version=__version__,
        git=git_revision(),
    )
