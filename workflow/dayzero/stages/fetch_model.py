"""Bring the run's model here as a plain Hugging Face directory: `store/models/{key}`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dayzero.stages.base import read_config, run_stage, stage_parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = stage_parser("fetch_model", __doc__)
    parser.add_argument("--output", required=True, type=Path, help="the folder to make, store/models/KEY")
    return run_stage(parser, body, argv, network=True)


def body(args: argparse.Namespace) -> None:
    """Fetch `config.model` into `args.output`."""
    from dayzero.config import Model
    from dayzero.data.model_files import fetch_model
    from dayzero.provenance import Clock

    clock = Clock()
    fetch_model(Model.model_validate(read_config(args.config).get("model") or {}), args.output, clock)


if __name__ == "__main__":
    sys.exit(main())
