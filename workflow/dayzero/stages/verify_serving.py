"""Compare vLLM with transformers on an exported model: parity.json, or a failure that names the difference."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dayzero.stages.base import read_config, run_stage, stage_parser, trusts_code


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = stage_parser("verify_serving", __doc__)
    parser.add_argument("--model", required=True, type=Path, help="an exported model's folder")
    parser.add_argument("--tokens", required=True, type=Path, help="the token store's folder, for the prompts")
    parser.add_argument("--output", required=True, type=Path, help="folder for parity.json")
    return run_stage(parser, body, argv)


def body(args: argparse.Namespace) -> None:
    """Write `args.output`/parity.json."""
    from dayzero.config import Serving
    from dayzero.console import log
    from dayzero.gpu_shares import own_gpus
    from dayzero.provenance import Clock
    from dayzero.serving.parity import compare, write_verdict

    clock = Clock()
    given = read_config(args.config)
    config = Serving.model_validate(given.get("serving") or {})
    with own_gpus(1):  # before transformers is imported: with torchao that settles which GPUs there are
        result = compare(config, args.model, args.tokens, trusts_code(given))
    result["provenance"] = clock.provenance()
    write_verdict(args.output / "parity.json", result)
    log.info(
        "vLLM %s agrees on %d greedy tokens (%d near ties); prompt log probabilities within %.2g",
        result["vllm"],
        result["tokens_compared"],
        result["near_ties"],
        result["max_logprob_difference"],
    )


if __name__ == "__main__":
    sys.exit(main())
