"""Show rows of a run's tokens with what is supervised coloured, in the terminal and as an HTML file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dayzero.stages.base import run_stage, stage_parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = stage_parser("inspect_rows", __doc__, config=False)
    parser.add_argument("--experiment", help="a name in config/experiments or a file; default: that of config.yaml")
    parser.add_argument("--run", required=True, help="one of its runs")
    parser.add_argument("--results", help="the folder of all results; default: results_dir of config.yaml")
    parser.add_argument("--split", default="train", choices=["train", "validation"])
    parser.add_argument("--row", type=int, default=0, help="the first row to show, from 0")
    parser.add_argument("--num-rows", type=int, default=1, help="how many rows to show")
    parser.add_argument("--html", type=Path, help="the page to write; default: inspect.html in the run's folder")
    parser.add_argument("--print-target", action="store_true", help="only print the manifest of the run's tokens")
    return run_stage(parser, body, argv)


def body(args: argparse.Namespace) -> None:
    """Print the rows and write the page, or only name the file they come from."""
    from dayzero.errors import ConfigError
    from dayzero.site_config import load
    from dayzero.wiring import Wiring

    experiment, results = load(args.experiment)
    wiring = Wiring(experiment, args.results or results)
    run = wiring.run(args.run)
    tokens, data = Path(wiring.tokens(run)), Path(wiring.data(run))
    if args.print_target:
        print(tokens / "manifest.json")
        return
    if not (tokens / args.split).is_dir():
        raise ConfigError(f"{tokens / args.split} is not there: make it with `snakemake {tokens}/manifest.json`")

    from rich.console import Console

    from dayzero.console import log
    from dayzero.data.inspection import html_page, print_rows, view_rows
    from dayzero.data.tokenizer import TokenizerSource
    from dayzero.data.tokens import TokenRows
    from dayzero.files import atomic_file, read_json

    tokenizer = TokenizerSource(Path(wiring.tokenizer(run)), None, run.model.trust_remote_code).load()
    split = read_json(data / "manifest.json")["splits"][args.split]
    rows = TokenRows(tokens / args.split)
    indices = range(args.row, min(args.row + max(args.num_rows, 1), max(len(rows), args.row + 1)))
    views = view_rows(rows, indices, tokenizer, data / split["file"])
    title = f"{wiring.name}/{args.run}: rows {indices.start} to {indices.stop - 1} of {len(rows)} {args.split} rows"
    page = args.html or Path(wiring.experiment) / args.run / "inspect.html"
    with atomic_file(page) as file:
        file.write_text(html_page(views, title), encoding="utf-8")
    print_rows(views, Console())  # after the page, which is there even if a reader such as head closes the pipe
    log.info("also written to %s", page)


if __name__ == "__main__":
    sys.exit(main())
