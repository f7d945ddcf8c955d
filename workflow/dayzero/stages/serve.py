"""Serve an exported model with vLLM behind an OpenAI-compatible API, until ctrl-C."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dayzero.stages.base import run_stage


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="dayzero.stages.serve", description=__doc__)
    parser.add_argument(
        "--model", required=True, type=Path, help="an exported model's folder, results/EXPERIMENT/RUN/model"
    )
    parser.add_argument("--name", help="the model's name in requests; default: the run's name")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument(
        "--max-model-len", type=int, help="longest sequence in tokens; default: the context, at most 4096"
    )
    parser.add_argument("--log", help="also write the log to this file")
    return run_stage(parser, _serve, argv)


def _serve(args: argparse.Namespace) -> None:
    from dayzero.serving.server import serve

    name = args.name or (args.model.resolve().parent.name if args.model.name == "model" else args.model.resolve().name)
    raise SystemExit(
        serve(
            args.model,
            name=name,
            host=args.host,
            port=args.port,
            dtype=args.dtype,
            max_model_len=args.max_model_len,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
