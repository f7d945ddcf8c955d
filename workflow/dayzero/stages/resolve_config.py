"""Write config.json: one run of an experiment with every key resolved, the input of every later stage."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dayzero.config_overrides import parse_assignments
from dayzero.experiment import experiment_path, load_experiment
from dayzero.files import write_json
from dayzero.stages.base import run_stage


def parser() -> argparse.ArgumentParser:
    """What this stage takes: the only one that reads the experiment's file instead of a config.json."""
    parser = argparse.ArgumentParser(prog="dayzero.stages.resolve_config", description=__doc__)
    parser.add_argument("--experiment", required=True, help="the experiment's file, or its name in config/experiments")
    parser.add_argument("--run", required=True, help="the run to resolve")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="win over the file")
    parser.add_argument("--output", required=True, help="the config.json to write")
    parser.add_argument("--log", help="also write the log to this file")
    return parser


def body(args: argparse.Namespace) -> None:
    """Resolve and write."""
    overrides = parse_assignments(args.set)
    experiment = load_experiment(experiment_path(args.experiment), overrides, only=[args.run])
    write_json(args.output, experiment.runs[args.run].resolved())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage and return its exit code."""
    return run_stage(parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
