"""Settings that a run would ignore."""

from __future__ import annotations

from collections.abc import Iterator

from dayzero.config import Optimizer, RunConfig
from dayzero.config_checks.finding import Finding
from dayzero.config_checks.sources import rows_from

LOSS_KEYS = ("loss_turns", "loss_roles", "loss_parts", "loss_reasoning")
"""Keys of `tokenize` that say what of a conversation is supervised."""


def without_effect(run: RunConfig) -> list[Finding]:
    """Prefixes of keys that do nothing in this run, each with the reason."""
    found = []
    method = run.method.name
    if method == "none":
        reason = "method.name none trains nothing, so this would be ignored"
        found += [Finding("train", reason), Finding("parallelism", reason)]
    if not run.method.adapters:
        found.append(Finding("method.lora", f"only method.name lora uses it, this run's is {method}"))
    if method != "kd":
        found.append(Finding("method.kd", f"only method.name kd uses it, this run's is {method}"))
    if method == "none":
        found.append(Finding("method.freeze", "method.name none trains nothing, so this would be ignored"))
    if run.train.loss not in ("auto", "chunked", "loss_parallel"):
        found.append(
            Finding("train.loss_chunk_size", f"only train.loss chunked uses it, this run's is {run.train.loss}")
        )
    if run.train.lr_scheduler.name != "wsd":
        name = run.train.lr_scheduler.name
        found.append(
            Finding("train.lr_scheduler.decay_steps", f"only train.lr_scheduler.name wsd uses it, this run's is {name}")
        )
    found += _unused_by_optimizer(run.train.optimizer)
    for split in ("validation", "test"):
        if getattr(run.data, f"{split}_source"):
            found.append(Finding(f"data.{split}_size", f"data.{split}_source gives the rows: leave one of the two out"))
    if not any(source.startswith("hf:") for source in rows_from(run)):
        found += [Finding(f"data.{key}", "only hf: sources have it") for key in ("subset", "split", "streaming")]
    if run.data.format not in ("auto", "messages", "sharegpt", "alpaca", "template", "function_calling"):
        reason = f"only conversations have turns, data.format {run.data.format} makes none"
        found += [Finding(f"tokenize.{key}", reason) for key in LOSS_KEYS]
    return found


def _unused_by_optimizer(optimizer: Optimizer) -> Iterator[Finding]:
    users = {
        "muon": ("muon",),
        "adafactor": ("adafactor",),
        "betas": ("adamw", "muon", "adamw8bit"),
        "eps": ("adamw", "muon", "adamw8bit"),
        "implementation": ("adamw", "muon"),
        "state_dtype": ("adamw", "muon", "adafactor"),
    }
    for key, names in users.items():
        if optimizer.name not in names:
            only = f"only train.optimizer.name {' or '.join(names)} uses it, this run's is {optimizer.name}"
            yield Finding(f"train.optimizer.{key}", only)
