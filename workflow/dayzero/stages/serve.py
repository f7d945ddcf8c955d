"""Serve an exported model with vLLM behind an OpenAI-compatible API, until ctrl-C."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dayzero.stages.base import run_stage, stage_parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = stage_parser("serve", __doc__, config=False)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", help="a run of the experiment, whose model is served")
    which.add_argument("--model", type=Path, help="an exported model's folder, results/EXPERIMENT/RUN/model")
    parser.add_argument("--experiment", help="a name in config/experiments or a file; default: that of config.yaml")
    parser.add_argument("--print-target", action="store_true", help="only print the manifest of the run's model")
    parser.add_argument("--name", help="the model's name in requests; default: the run's name")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument(
        "--max-model-len", type=int, help="longest sequence in tokens; default: the context, at most 4096"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that ships with the model; with --run its model.trust_remote_code decides",
    )
    return run_stage(parser, body, argv)


def body(args: argparse.Namespace) -> None:
    """Serve until stopped, or only name the model's manifest."""
    from dayzero.errors import ConfigError
    from dayzero.remote_code import require_trusted_code
    from dayzero.serving.server import serve
    from dayzero.site_config import load
    from dayzero.wiring import Wiring

    if args.run is None and (args.experiment or args.print_target):
        raise ConfigError("--experiment and --print-target go with --run, not with --model")
    if args.run is not None and args.trust_remote_code:
        raise ConfigError("--trust-remote-code goes with --model: set model.trust_remote_code of the run")
    model, trust = args.model, args.trust_remote_code
    if args.run is not None:
        wiring = Wiring(*load(args.experiment))
        trust = wiring.run(args.run).model.trust_remote_code
        model = Path(wiring.experiment) / args.run / "model"
    else:
        require_trusted_code(model, trust, switch="--trust-remote-code")
    if args.print_target:
        print(model / "manifest.json")
        return
    name = args.name or (model.resolve().parent.name if model.name == "model" else model.resolve().name)
    code = serve(
        model,
        name=name,
        host=args.host,
        port=args.port,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        trust_remote_code=trust,
    )
    raise SystemExit(code)


if __name__ == "__main__":
    sys.exit(main())
