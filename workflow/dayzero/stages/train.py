"""Train one run: token rows and a model in, metrics, checkpoints and (for LoRA) an adapter out.

Started by a person or a rule it checks what can be checked without a process group and starts torchrun on itself; the
processes that torchrun starts do the training.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from dayzero.engine.launch import is_worker, reports_errors
from dayzero.engine.signals import SIGNALS, never_ended_by_a_stop
from dayzero.stages.base import run_stage, stage_parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = stage_parser("train", __doc__)
    parser.add_argument("--tokens", type=Path, required=True, help="store/tokens/KEY")
    parser.add_argument("--model", type=Path, help="store/models/KEY; not for random weights from model.architecture")
    parser.add_argument("--tokenizer", type=Path, help="store/tokenizers/KEY, with model.architecture")
    parser.add_argument("--teacher", type=Path, help="the teacher of method kd: store/models/KEY or {run}/model")
    parser.add_argument("--output", type=Path, required=True, help="{experiment}/{run}/train")
    parser.add_argument(
        "--set-aside-other-checkpoints",
        action="store_true",
        help="train afresh where the checkpoints are of another config (default: refuse, naming the differing keys)",
    )
    machine = parser.add_argument_group("where it runs; changes no result")
    machine.add_argument("--nodes", type=int, default=1, help="nodes of a SLURM job (default 1)")
    machine.add_argument("--max-requeues", type=int, default=100, help="times a SLURM job is put back (default 100)")
    machine.add_argument("--stop-before", type=int, default=0, help="seconds before a job's end to stop at (default 0)")
    machine.add_argument("--network-interface", help="network interface of every node for NCCL and gloo")
    arguments = sys.argv[1:] if argv is None else list(argv)

    def body(args: argparse.Namespace) -> None:
        if is_worker():
            from dayzero.stages.training.rank import run_rank

            run_rank(args)
        else:
            from dayzero.stages.training.launch import launch

            launch(args, arguments)

    return run_stage(parser, body, argv)


def process() -> int:
    """`main` of a process of its own, which no request to stop ends: it is heeded when training has begun, or kept from
    beginning.

    Not so in a rank of a torchrun that a person started, which ends its ranks as it sees fit. Ctrl-C still ends the
    checks before training.
    """
    if is_worker():
        return never_ended_by_a_stop(main) if reports_errors() else main()
    return never_ended_by_a_stop(main, [s for s in SIGNALS if s != signal.SIGINT])


if __name__ == "__main__":
    sys.exit(process())
