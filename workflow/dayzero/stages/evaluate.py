"""Score an exported model with lm-eval: results.json, and samples.jsonl with every item behind the scores."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dayzero.stages.base import read_config, run_stage, stage_parser, trusts_code


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = stage_parser("evaluate", __doc__)
    parser.add_argument("--model", required=True, type=Path, help="an exported model's folder")
    parser.add_argument("--data", required=True, type=Path, help="the data's folder in the store, with test.parquet")
    parser.add_argument("--tasks-dir", required=True, type=Path, help="the folder of the local task YAML files")
    parser.add_argument("--output", required=True, type=Path, help="folder for results.json and samples.jsonl")
    return run_stage(parser, body, argv)


def body(args: argparse.Namespace) -> None:
    """Write `args.output`/results.json and samples.jsonl."""
    from dayzero.config import Evaluate
    from dayzero.console import log
    from dayzero.evaluation.harness import evaluate_model
    from dayzero.files import atomic_file, sha256_file, write_json
    from dayzero.gpu_shares import own_gpus
    from dayzero.provenance import Clock

    clock = Clock()
    given = read_config(args.config)
    config, trust = Evaluate.model_validate(given.get("evaluate") or {}), trusts_code(given)
    with own_gpus(1):  # before transformers is imported: with torchao that settles which GPUs there are
        results, samples = evaluate_model(config, args.model, args.data, args.tasks_dir, trust)
    with atomic_file(args.output / "samples.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as f:
        for sample in samples:
            f.write(json.dumps(sample) + "\n")
    results["samples_sha256"] = sha256_file(args.output / "samples.jsonl")
    results["provenance"] = clock.provenance(seed=config.seed)
    write_json(args.output / "results.json", results)
    for task, entry in results["tasks"].items():
        for name, metric in entry["metrics"].items():
            error = "" if metric["stderr"] is None else f" ± {metric['stderr']:.4f}"
            log.info("%s %s = %.4f%s (%s items)", task, name, metric["value"], error, entry["num_items"])


if __name__ == "__main__":
    sys.exit(main())
