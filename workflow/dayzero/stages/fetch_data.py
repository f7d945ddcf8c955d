"""Read the run's data from its sources, normalise and split it: `store/data/{key}`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dayzero.stages.base import read_config, run_stage, stage_parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = stage_parser("fetch_data", __doc__)
    parser.add_argument("--output", required=True, type=Path, help="the folder to make, store/data/KEY")
    parser.add_argument("--streaming", action="store_true", help="read hf: sources without a copy on this disk")
    return run_stage(parser, body, argv, network=True)


def body(args: argparse.Namespace) -> None:
    """Fetch `config.data` into `args.output`."""
    from dayzero.config import Data
    from dayzero.data.data_files import fetch_data
    from dayzero.provenance import Clock

    clock = Clock()
    data = Data.model_validate(read_config(args.config).get("data") or {})
    if args.streaming:
        data = data.model_copy(update={"streaming": True})
    fetch_data(data, args.output, clock)


if __name__ == "__main__":
    sys.exit(main())
