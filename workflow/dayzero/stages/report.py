"""Report of an experiment's runs: one self-contained HTML page, results.csv, results.tex, SVG and PNG plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dayzero.stages.base import run_stage, stage_parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = stage_parser("report", __doc__, config=False)
    parser.add_argument("--experiment", required=True, help="the experiment's name")
    parser.add_argument("--description", default="", help="what the experiment asks, for the page's head")
    parser.add_argument(
        "--runs", required=True, nargs="+", type=Path, help="the runs' directories, in the table's order"
    )
    parser.add_argument("--output", required=True, type=Path, help="the report's directory")
    return run_stage(parser, body, argv)


def body(args: argparse.Namespace) -> None:
    """Write the report of `args.runs` into `args.output`."""
    from dayzero.console import log
    from dayzero.files import atomic_directory
    from dayzero.reporting.collect import read_runs
    from dayzero.reporting.report import write_report

    runs = read_runs(args.runs)
    with atomic_directory(args.output) as directory:
        write_report(args.experiment, args.description, runs, directory)
    log.info("%d runs: %s", len(runs), args.output / "index.html")


if __name__ == "__main__":
    sys.exit(main())
