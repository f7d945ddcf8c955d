"""Make a plain Hugging Face directory of a run's weights and prove that it reloads to the model that was trained."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dayzero.config import RunConfig
from dayzero.console import log
from dayzero.errors import ConfigError
from dayzero.files import atomic_directory, read_json, sha256_file, write_json
from dayzero.provenance import Clock
from dayzero.remote_code import require_trusted_code
from dayzero.stages.base import read_config, run_stage, stage_parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = stage_parser("export", __doc__)
    parser.add_argument("--model", type=Path, help="store/models/KEY: the base model")
    parser.add_argument("--tokenizer", type=Path, help="store/tokenizers/KEY, where one was trained")
    parser.add_argument("--train", type=Path, help="{experiment}/{run}/train; not for method none")
    parser.add_argument("--output", type=Path, required=True, help="{experiment}/{run}/model")
    return run_stage(parser, body, argv)


def body(args: argparse.Namespace) -> None:
    """Write the model's folder `args.output`."""
    clock = Clock()
    run = RunConfig.from_resolved(read_config(args.config), "--config")
    if (run.method.name != "none") != (args.train is not None):
        raise ConfigError(f"method.name is {run.method.name}: --train belongs to trained runs, and only to those")
    if args.model is None and run.model.architecture is None:
        raise ConfigError("--model is missing: give store/models/KEY")
    if args.model is None and args.tokenizer is None:
        raise ConfigError("--tokenizer is missing: give store/tokenizers/KEY (or store/models/KEY, where it has one)")

    import torch
    from transformers import AutoTokenizer, GenerationConfig

    from dayzero.data.tokenizer import read_chat_template
    from dayzero.engine.consolidate import write_model
    from dayzero.engine.export import (
        TOLERANCE,
        compare_with_training,
        logit_difference,
        reloaded_logits,
        streamed_logits,
    )
    from dayzero.engine.model import ModelSource
    from dayzero.engine.precision import weights_dtype
    from dayzero.engine.trained_weights import TrainedWeights

    trust = run.model.trust_remote_code
    source = ModelSource(
        directory=args.model,
        architecture=run.model.architecture,
        random_weights=run.method.name == "pretrain",
        trust_remote_code=trust,
    )
    ema = run.export.weights == "ema"
    kept_in = weights_dtype(run.train.precision)
    weights = TrainedWeights(source, args.tokenizer, run.method, run.seed, args.train, dtype=kept_in, ema=ema)
    model, read = weights.model, weights.read
    require_trusted_code(args.tokenizer or args.model, trust)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model, trust_remote_code=trust)
    if run.model.chat_template:
        tokenizer.chat_template = read_chat_template(run.model.chat_template)
    probe = _probe(args, tokenizer)
    checks: dict[str, Any] = {"tokens": probe["input_ids"].shape[1]}
    logits = streamed_logits(model, read, probe["input_ids"])
    if args.train:
        trained = probe["ema_logits" if ema else "logits"]
        found = compare_with_training(model, read, probe["input_ids"], logits, trained)
        remedy = f"--train {args.train} is not of this model, or damaged: remove it and train again"
        _require("exported and in-training", found.difference, found.tolerance, remedy)
        checks["training"] = asdict(found)

    stored = read_json(args.model / "manifest.json").get("dtype") if args.model else None
    dtype = run.export.dtype or (stored if stored in ("float32", "bfloat16", "float16") else "float32")
    if args.model and (args.model / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(args.model)
    model.config.use_cache = True  # off only while training
    torch_dtype = getattr(torch, dtype)
    if torch_dtype != torch.float32:  # what the directory must give is what rounded weights give
        logits = streamed_logits(model, read, probe["input_ids"], torch_dtype)
    with atomic_directory(args.output) as directory:
        write_model(directory, model, read, torch_dtype, run.export.max_shard_size, weights.weights.tied)
        tokenizer.save_pretrained(directory)
        num_parameters = sum(p.numel() for p in model.parameters())
        reloaded, how = reloaded_logits(directory, probe["input_ids"], trust)
        difference = logit_difference(reloaded, logits)
        remedy = "transformers does not read this architecture as it writes it: take another version of transformers"
        _require("reloaded and exported", difference, TOLERANCE, remedy)
        checks |= {"max_logit_difference": difference, "tolerance": TOLERANCE, "loaded": how}
        log.info("reloads with logits within %.2g (allowed %.2g)", difference, TOLERANCE)
        files = {p.name: sha256_file(p) for p in sorted(directory.iterdir()) if p.is_file()}
        provenance = clock.provenance()
        (directory / "README.md").write_text(model_card(run, args, dtype, provenance), encoding="utf-8")
        manifest = {
            "method": run.method.name,
            "dtype": dtype,
            "num_parameters": num_parameters,
            "reload": checks,
            "files": files,
            "provenance": provenance,
        }
        write_json(directory / "manifest.json", manifest)


def _probe(args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Token ids, and the logits that training gave for them where there was training."""
    import torch
    from safetensors.torch import load_file

    if args.train:
        return load_file(args.train / "probe.safetensors")
    return {"input_ids": torch.tensor([tokenizer("The exported model must be the model that was loaded.").input_ids])}


def _require(what: str, difference: float, tolerance: float, remedy: str) -> None:
    if not difference <= tolerance:  # also refuses NaN
        raise ConfigError(
            f"nothing is exported: the {what} logits differ by {difference:.3g}, more than {tolerance:.3g} of their "
            f"size: {remedy}"
        )


def model_card(run: RunConfig, args: argparse.Namespace, dtype: str, provenance: dict[str, Any]) -> str:
    """The directory's README.md: what it was made from and how."""
    base = read_json(args.model / "manifest.json") if args.model else {}
    header = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["dayzero", run.method.name]}
    if licence := base.get("licence"):
        header["license"] = licence
    git = provenance["git"] or {"commit": "unknown"}
    modified = ", modified" if git.get("dirty") else ""
    rows = {
        "base model": run.model.source or f"random weights, {(run.model.architecture or {}).get('model_type')}",
        "base revision": base.get("revision"),
        "data": json.dumps(run.data.source) if args.train else None,
        "method": run.method.name,
        "teacher": run.method.kd.teacher if run.method.name == "kd" else None,
        "average": f"decay {run.train.ema.decay:g}" if run.export.weights == "ema" and run.train.ema else None,
        "seed": run.seed,
        "weights": dtype,
        "dayzero": f"{provenance['dayzero']} (commit {git['commit']}{modified})",
        "packages": ", ".join(f"{name} {version}" for name, version in provenance["packages"].items()),
        "made": provenance["finished"],
    }
    if args.train:
        summary = read_json(args.train / "summary.json")
        rows |= {"steps": summary["steps"], "last loss": summary["loss"], "validation loss": summary["validation_loss"]}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value is not None)
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    return (
        f"---\n{front}\n---\n\n# {run.experiment}/{run.run}\n\n| | |\n|---|---|\n{table}\n\n"
        f"The full configuration:\n\n```json\n{json.dumps(read_config(args.config), indent=2)}\n```\n"
    )


if __name__ == "__main__":
    sys.exit(main())
