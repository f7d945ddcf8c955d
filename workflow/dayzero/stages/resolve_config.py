"""Write config.json: one run of an experiment with every key resolved, the input of every later stage."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dayzero.config_overrides import parse_assignments
from dayzero.experiment import experiment_path, load_experiment
from dayzero.files import write_json
from dayzero.stages.base import run_stage, stage_parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code. The only stage that reads the experiment's file, not a config.json."""
    parser = stage_parser("resolve_config", __doc__, config=False)
    parser.add_argument("--experiment", required=True, help="the experiment's file, or its name in config/experiments")
    parser.add_argument("--run", required=True, help="the run to resolve")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="win over the file")
    parser.add_argument("--output", required=True, help="the config.json to write")
    return run_stage(parser, body, argv)


def body(args: argparse.Namespace) -> None:
    """Resolve and write."""
    overrides = parse_assignments(args.set)
    experiment = load_experiment(experiment_path(args.experiment), overrides, only=[args.run])
    write_json(args.output, experiment.runs[args.run].resolved())


if __name__ == "__main__":
    sys.exit(main())
