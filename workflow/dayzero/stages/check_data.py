"""Report on a data directory's rows; fail where too many of the evaluation's items stand in the training rows."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dayzero.stages.base import read_config, run_stage, stage_parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = stage_parser("check_data", __doc__)
    parser.add_argument("--data", required=True, type=Path, help="directory with the splits' Parquet files")
    parser.add_argument("--tasks-dir", required=True, type=Path, help="the folder of the local task YAML files")
    parser.add_argument("--output", required=True, type=Path, help="directory to make, with manifest.json")
    return run_stage(parser, body, argv)


def body(args: argparse.Namespace) -> None:
    """Write `args.output`/manifest.json."""
    from dayzero.config import DataCheck
    from dayzero.console import log
    from dayzero.data import quality
    from dayzero.files import atomic_directory, read_json, sha256_file, write_json
    from dayzero.provenance import Clock

    clock = Clock()
    config = read_config(args.config)
    check = DataCheck.model_validate(config.get("data_check") or {})
    data = read_json(args.data / "manifest.json")
    files = {name: args.data / split["file"] for name, split in data["splits"].items()}
    kind = data["format"]
    splits: dict[str, Any] = {}
    found: dict[str, Any] = {}
    if kind in quality.TEXTS:
        asked = _questions(args, config.get("tasks") or [])
        if "test" in files:
            asked = {"the test split": quality.held_out(files["test"], kind), **asked}
        contamination = quality.Contamination(asked, check.ngram, check.overlap)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        for name, file in files.items():
            seen_by = contamination if name == "train" else None
            with tempfile.TemporaryDirectory(dir=args.output.parent, prefix=f".{args.output.name}.") as workspace:
                splits[name] = quality.check_split(file, kind, check, name, Path(workspace), seen_by)
            _say(name, splits[name])
        found = contamination.result()
        quality.name_rows(found, files["train"])
        quality.refuse_contamination(found, check)
    else:
        log.warning("rows of format %s hold no text: neither duplicates nor contamination are looked for", kind)
    with atomic_directory(args.output) as output:
        manifest = {
            "format": kind,
            "splits": splits,
            "contamination": {"tasks": found, **check.model_dump(include={"ngram", "overlap", "max_contamination"})},
            "provenance": clock.provenance(inputs={"data": sha256_file(args.data / "manifest.json")}),
        }
        write_json(output / "manifest.json", manifest)


def _questions(args: argparse.Namespace, names: list[str]) -> dict[str, list[str]]:
    """Task -> what each of its items asks."""
    if not names:
        return {}
    from dayzero.evaluation.tasks import load_tasks, task_questions

    with tempfile.TemporaryDirectory(prefix="dayzero-tasks-") as work_dir:
        tasks = load_tasks(names, args.tasks_dir, args.data, Path(work_dir))["tasks"]
        return {name: task_questions(task) for name, task in tasks.items()}


def _say(name: str, split: dict[str, Any]) -> None:
    from dayzero.console import log

    log.info(
        "%s: %d rows, %d without an answer, %.1f %% exact and %.1f %% near duplicates, languages: %s",
        name,
        split["rows"],
        split["empty_answers"],
        100 * split["exact_duplicates"]["share"],
        100 * split["near_duplicates"]["share"],
        ", ".join(list(split["languages"])[:5]) or "none",
    )


if __name__ == "__main__":
    sys.exit(main())
