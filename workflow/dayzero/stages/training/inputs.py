"""What the train stage is given: the run's config, the models, and which of it decides the weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dayzero.config import RunConfig
from dayzero.engine.model import ModelSource
from dayzero.errors import ConfigError
from dayzero.files import read_json, sha256_json
from dayzero.stages.base import read_config

FREE_TO_CHANGE = {
    "train": {
        "local_batch_size", "loss", "loss_chunk_size", "activation_checkpointing", "compile", "validate_every",
        "checkpoint", "num_data_workers", "cpu_offload", "attention", "kernels",
    },
}  # fmt: skip
"""Keys that do not decide what is learnt: a checkpoint may be continued with other values, on other ranks too."""


def read_run(args: argparse.Namespace) -> RunConfig:
    """The run's config. Raises `ConfigError` where it and the paths on the command line do not go together."""
    if not (args.tokens / "manifest.json").is_file():
        raise ConfigError(f"--tokens {args.tokens} has no manifest.json: run the tokenize stage first")
    run = RunConfig.from_resolved(read_config(args.config), "--config")
    if run.method.name == "none":
        raise ConfigError("method.name is none: this run is not trained; choose full, lora or pretrain")
    if (run.method.name == "kd") != (args.teacher is not None):
        raise ConfigError(f"method.name is {run.method.name}: --teacher belongs to kd, and only to it")
    if args.teacher is not None and not (args.teacher / "manifest.json").is_file():
        raise ConfigError(f"--teacher {args.teacher} has no manifest.json: finish the stage that makes it first")
    if args.model is None and run.model.architecture is None:
        raise ConfigError("--model is missing: give store/models/KEY, or set model.architecture for random weights")
    return run


def model_source(run: RunConfig, args: argparse.Namespace) -> ModelSource:
    """The model that is trained."""
    return ModelSource(
        directory=args.model,
        architecture=run.model.architecture,
        random_weights=run.method.name == "pretrain",
        trust_remote_code=run.model.trust_remote_code,
    )


def teacher_source(run: RunConfig, args: argparse.Namespace) -> ModelSource | None:
    """The teacher of method kd."""
    if args.teacher is None:
        return None
    return ModelSource(directory=args.teacher, trust_remote_code=run.model.trust_remote_code)


def _content(folder: Path) -> str | None:
    """A hash of what the files in a folder hold, by its manifest; None where that does not say, or there is none.

    A folder's name says how it is made, not of what: a local file may have changed since.
    """
    manifest = folder / "manifest.json"
    files = read_json(manifest).get("files") if manifest.is_file() else None
    return sha256_json(files) if files else None


def identity(run: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """What decides the weights: the keys on which a checkpoint must agree to be continued."""
    config = run.resolved()
    kept = {name: value for name, value in config["train"].items() if name not in FREE_TO_CHANGE["train"]}
    return {
        "seed": run.seed,
        "method": run.method.used(),
        **({"teacher": _content(args.teacher)} if args.teacher else {}),
        "train": kept,
        "model": {
            "store": args.model.name if args.model else None,
            "content": _content(args.model) if args.model else None,
            "architecture": config["model"]["architecture"],
        },
        "tokens": {
            "store": args.tokens.name,
            "content": _content(args.tokens),
            **({"weights": run.data.weights, "source": run.data.source} if run.data.weights else {}),
        },
    }
