"""What training leaves for the later stages: adapter, probe logits, metrics.jsonl and, last, summary.json."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dayzero import attempts
from dayzero.checkpoint_files import step_of
from dayzero.config import RunConfig
from dayzero.data.tokens import TokenRows
from dayzero.engine.checkpoint import best_checkpoint
from dayzero.engine.gathering import float32_logits, whole_averages, whole_weights
from dayzero.engine.lora import save_adapter
from dayzero.engine.trainer import Trainer
from dayzero.files import atomic_directory, atomic_file, write_json
from dayzero.provenance import Clock

PROBE_TOKENS = 32
"""Length of the text on which the exported model must give the logits of training."""


def write_results(
    output: Path, run: RunConfig, trainer: Trainer, rows: TokenRows, clock: Clock, mix: list[dict[str, Any]] | None
) -> None:
    """All ranks take part, rank 0 writes. `mix`: what `Mix.describe` says, where sources are weighted."""
    model = trainer.model
    probe = _probe(rows)
    positions = torch.arange(probe.shape[1]).unsqueeze(0)
    logits = float32_logits(model, probe, positions)
    tensors = {"input_ids": probe, "logits": logits.contiguous()}
    adapters = {"adapter": whole_weights(model)} if run.method.adapters else {}
    if trainer.ema:
        tensors["ema_logits"] = float32_logits(model, probe, positions, trainer.ema).contiguous()
        if run.method.adapters:
            adapters["adapter_ema"] = whole_averages(model, trainer.ema)
    if not trainer.is_main:
        return
    for name, weights in adapters.items():
        settings = model.weights.method.adapters  # with the targets that this model has
        assert settings
        with atomic_directory(output / name) as adapter:
            save_adapter(adapter, settings, weights, str(run.model.source), model.weights.tied)
    with atomic_file(output / "probe.safetensors") as file:
        save_file(tensors, file)
    with atomic_file(output / "metrics.jsonl") as file:
        shutil.copyfile(trainer.metrics.path, file)
    write_json(output / "summary.json", _summary(output, run, trainer, clock, mix))


def _probe(rows: TokenRows) -> Tensor:
    """Token ids [1, T]: the beginning of the first document."""
    row = rows.row(0)
    first_document = row.position_ids[1:].tolist().index(0) + 1 if 0 in row.position_ids[1:] else len(row.input_ids)
    return torch.from_numpy(row.input_ids[: min(first_document, PROBE_TOKENS)]).unsqueeze(0)


def _summary(
    output: Path, run: RunConfig, trainer: Trainer, clock: Clock, mix: list[dict[str, Any]] | None
) -> dict[str, Any]:
    best: dict[str, Any] | None = None
    if run.train.checkpoint.keep_best and (path := best_checkpoint(trainer.checkpoints, trainer.validation_losses)):
        loss = trainer.validation_losses[step_of(path)]
        best = {"checkpoint": f"checkpoints/{path.name}", "step": step_of(path), "validation_loss": loss}
    records = trainer.metrics.records
    return {
        "method": run.method.name,
        "steps": trainer.step,
        "loss": records[-1]["loss"],
        "validation_loss": trainer.validation_losses.get(trainer.step),
        "num_tokens": sum(r["num_tokens"] for r in records),
        "num_label_tokens": sum(r["num_label_tokens"] for r in records),
        "seconds": round(sum(r["step_seconds"] + r["data_seconds"] for r in records), 2),
        "tokens_per_second": median(r["tokens_per_second"] for r in records),
        "peak_memory_gib": max(r["peak_memory_gib"] for r in records),
        "world_size": trainer.dims.world_size,
        "parallelism": run.parallelism.model_dump(),
        "trainable_parameters": trainer.model.trainable_parameters,
        "total_parameters": trainer.model.total_parameters,
        "checkpoint": f"checkpoints/step_{trainer.step}",
        "best_checkpoint": best,
        "checkpoint_seconds": round(trainer.checkpoint_seconds, 3),
        "seed": run.seed,
        **({"mix": mix} if mix else {}),
        **({"attempts": tries} if (tries := attempts.Attempts(output).all()) else {}),
        "provenance": clock.provenance(identity=trainer.identity),
    }
