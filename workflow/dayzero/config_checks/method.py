"""What a method goes with."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dayzero.config import RunConfig


def check_lora(run: RunConfig) -> Iterator[tuple[str, str]]:
    lora = run.method.adapters
    if lora is None:
        return
    targets = lora.targets
    if run.method.name == "qlora":
        yield from _qlora(run)
    if lora.dora and run.parallelism.tp > 1:
        yield (
            "method.lora.dora",
            f"needs the lengths of whole weight rows, which parallelism.tp {run.parallelism.tp} splits: use dp_shard, "
            "or turn it off",
        )
    if not targets:
        yield "method.lora.targets", "names no module: use all-linear, module names or a regular expression"
    elif isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            yield "method.lora.targets", f"no regular expression: {error}"


def _qlora(run: RunConfig) -> Iterator[tuple[str, str]]:
    sizes = run.parallelism
    for name in ("tp", "pp", "ep"):
        if (size := getattr(sizes, name)) > 1:
            yield "method.name", f"qlora does not go with parallelism.{name} {size}: use dp_shard, dp_replicate or cp"
    if sizes.strategy == "ddp":
        yield (
            "method.name",
            "qlora does not go with parallelism.strategy ddp, which copies buffers in each step: use fsdp2",
        )
    if run.method.lora.dora:
        yield "method.lora.dora", "needs the lengths of weight rows, which method.name qlora has in 4 bits: use lora"


def check_kd(run: RunConfig) -> Iterator[tuple[str, str]]:
    if run.method.name != "kd":
        return
    if not run.method.kd.teacher:
        yield (
            "method.kd.teacher",
            "method.name kd needs it: name a run of this experiment, or a model as in model.source",
        )
    if run.train.loss not in ("auto", "chunked"):
        yield "train.loss", "method.name kd has a chunked loss of its own: use auto or chunked"
    if run.parallelism.pp > 1:
        yield "method.name", f"kd does not go with parallelism.pp {run.parallelism.pp}: use dp_shard, tp or cp"
    if run.parallelism.ep > 1:
        yield "method.name", f"kd is not tried with parallelism.ep {run.parallelism.ep}: use dp_shard, tp or cp"
    if run.parallelism.strategy == "megatron_fsdp":
        yield "method.name", "kd does not go with parallelism.strategy megatron_fsdp: use fsdp2"


def check_freeze(run: RunConfig) -> Iterator[tuple[str, str]]:
    if run.method.freeze and run.method.adapters:
        yield "method.freeze", "adapters leave all other weights frozen: choose what they adapt by method.lora.targets"
    if run.method.freeze and run.parallelism.pp > 1:
        yield (
            "method.freeze",
            f"parallelism.pp {run.parallelism.pp} may leave a stage with nothing to train: set pp 1, or empty it",
        )
