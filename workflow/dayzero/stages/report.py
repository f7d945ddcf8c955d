"""Report of an experiment's runs: one self-contained HTML page, results.csv, results.tex, SVG and PNG plots."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dayzero.stages.base import run_stage


def main(argv: Sequence[str] | None = None) -> int:
    """Read every run's files and write the report's directory."""
    parser = argparse.ArgumentParser(prog="dayzero.stages.report", description=__doc__)
    parser.add_argument("--experiment", required=True, help="the experiment's name")
    parser.add_argument("--description", default="", help="what the experiment asks, for the page's head")
    parser.add_argument(
        "--runs", required=True, nargs="+", type=Path, help="the runs' directories, in the table's order"
    )
    parser.add_argument("--output", required=True, type=Path, help="the report's directory")
    parser.add_argument("--log", help="also write the log to this file")
    return run_stage(parser, _report, argv)


def _report(args: argparse.Namespace) -> None:
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
