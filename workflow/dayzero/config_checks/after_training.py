"""Export and evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dayzero.config import RunConfig

_SIZE = re.compile(r"\d+(\.\d+)?\s?[KMGT]B", re.IGNORECASE)


def check_averages(run: RunConfig) -> Iterator[tuple[str, str]]:
    if run.export.weights == "ema" and (run.train.ema is None or run.method.name == "none"):
        yield "export.weights", "there is no average without train.ema: set train.ema.decay, or use last"
    if run.train.ema is not None and run.parallelism.strategy == "megatron_fsdp":
        yield "train.ema", "does not go with parallelism.strategy megatron_fsdp: use fsdp2, or set it to null"


def check_export_and_tasks(run: RunConfig) -> Iterator[tuple[str, str]]:
    size = run.export.max_shard_size
    if not _SIZE.fullmatch(size) or not float(size[:-2]):
        yield "export.max_shard_size", "write a number and a unit, e.g. 5GB"
    tasks = run.evaluate.tasks + run.evaluate.extra_tasks
    for task in sorted({task for task in tasks if tasks.count(task) > 1}):
        yield "evaluate.tasks", f"{task} is named twice (in tasks and extra_tasks together)"
