"""dayzero's engine on a benchmark's task, one process, no torchrun.

    python -m benchmarks.ours TASK.json WAY [TRACE.json]

It is the engine as the train stage runs it: same trainer, loader rows and defaults (FSDP2). With a TRACE the
steps behind the warm-up run under torch.profiler, whose table is printed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from dayzero.config import Method, Train
from dayzero.data.loader import TrainBatches
from dayzero.data.tokens import IGNORE, TokenRows
from dayzero.engine import distributed
from dayzero.engine.lora import save_adapter
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.trainer import Trainer
from torch.profiler import profile as profiler

from benchmarks.workload import Clock, Measured, Task, report
from tests.token_store import write_token_store

WAYS: dict[str, dict[str, Any]] = {
    "dayzero": {},
    "dayzero compiled": {"compile": True},
    "dayzero packed": {"documents_per_row": 2},
    "dayzero packed, compiled": {"documents_per_row": 2, "compile": True},
}
"""Changes to the train section, and `documents_per_row`."""

GPU_WAYS: dict[str, dict[str, Any]] = {
    "dayzero bf16": {},
    "dayzero bf16 compiled": {"compile": True},
}
GPU_WAYS["dayzero fp8"] = {"fp8": {"recipe": "tensorwise", "emulate": not torch.cuda.is_available()}}
GPU_WAYS["dayzero fp8 compiled"] = {**GPU_WAYS["dayzero fp8"], "compile": True}
GPU_WAYS["dayzero fp8 rowwise compiled"] = {
    "fp8": {**GPU_WAYS["dayzero fp8"]["fp8"], "recipe": "rowwise"},
    "compile": True,
}


class _InOrder(TrainBatches):
    """The rows as they lie in the store."""

    def global_batch(self, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)


def called(arguments: list[str]) -> Measured:
    """What the command does."""
    if arguments[0] == "prepare":
        model, tokens, folder = map(Path, arguments[1:4])
        prepare(model, tokens, folder, int(arguments[4]), float(arguments[5]))
        return Measured(way="prepare", step_seconds=[], step_cpu_seconds=[], losses=[], num_tokens=[])
    task, way = Task(**json.loads(Path(arguments[0]).read_text())), arguments[1]
    return run(task, way, {**WAYS, **GPU_WAYS}[way], profile=arguments[2] if len(arguments) > 2 else None)


def prepare(model: Path, tokens: Path, folder: Path, rank: int, alpha: float) -> None:
    """Write `folder/adapter`, a LoRA adapter as the engine makes it with seed 0, and `folder/documents.jsonl`, the
    documents of a token store in random order."""
    method = Method(name="lora", lora={"rank": rank, "alpha": alpha})  # type: ignore[arg-type]
    source = ModelSource(directory=model)
    built = build_model(source, source.config(), method, 0, meta=False)
    save_adapter(folder / "adapter", method.lora, dict(built.named_parameters()), base_model=str(model))
    rows = TokenRows(tokens / "train", packed=False)
    with open(folder / "documents.jsonl", "w") as file:
        for index in np.random.default_rng(0).permutation(len(rows)).tolist():
            row = rows.row(index)
            labels = [IGNORE, *row.labels[:-1].tolist()]  # a store's labels are those of the next position
            file.write(json.dumps({"input_ids": row.input_ids.tolist(), "labels": labels}) + "\n")


def run(task: Task, way: str, setting: dict[str, Any], profile: str | None = None) -> Measured:
    """Train `task`; with `profile` the steps behind the warm-up are traced into that file and their table printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with patch.dict(os.environ, one):
        return _run(task, way, setting, profile)


def _run(task: Task, way: str, setting: dict[str, Any], profile: str | None) -> Measured:
    setting = {"documents_per_row": 1, **setting}
    together = setting.pop("documents_per_row")
    rows_per_step = task.batch_size // together
    train = {
        "max_steps": task.steps,
        "global_batch_size": rows_per_step,
        "local_batch_size": min(task.local_batch_size or 1, rows_per_step),
        "precision": task.precision,
        "optimizer": {"lr": task.lr, "betas": (0.9, 0.95)},
        "lr_scheduler": {"name": "constant"},
        "checkpoint": {"every": 0},
    }
    with tempfile.TemporaryDirectory() as folder, distributed.process_group() as device:
        documents = task.read_documents()
        pairs = [(d["input_ids"], [label >= 0 for label in d["labels"]]) for d in documents]
        write_token_store(
            Path(folder) / "rows", pairs, [list(range(i, i + together)) for i in range(0, len(pairs), together)]
        )
        lora = {"rank": task.rank, "alpha": task.alpha}
        model = ParallelModel(
            source=ModelSource(directory=Path(task.model)),
            method=Method(name="lora", lora=lora) if task.adapter else Method(name="full"),  # type: ignore[arg-type]
            train=Train(**{**train, **setting}),
            dims=ParallelDims(strategy="fsdp2", world_size=1, dp_shard=1),
            seed=0,
            device=device,
        )
        trainer = Trainer(model=model, directory=Path(folder), identity={}, max_steps=task.steps)
        batches = _InOrder(
            TokenRows(Path(folder) / "rows"),
            global_batch_size=rows_per_step,
            local_batch_size=trainer.train.local_batch_size,
            max_steps=task.steps,
        )
        clock = Clock()
        traced = profiler()
        begin = {task.warmup: traced.start} if profile else {}
        trainer.train_step = _ticking(trainer.train_step, clock, begin)  # type: ignore[method-assign]
        clock.start()
        trainer.fit(lambda _: batches, None)
        if profile:
            traced.stop()
            traced.export_chrome_trace(profile)
            print(traced.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=60))
        records = trainer.metrics.records
    return Measured(
        way=way,
        **clock.spans(),
        losses=[r["loss"] for r in records],
        num_tokens=[r["num_tokens"] for r in records],
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
    )


def _ticking(step: Callable[..., Any], clock: Clock, before: Mapping[int, Callable[[], object]]) -> Callable[..., Any]:
    """`step` with a tick of the clock behind it; `before`: what to call before which step."""

    def timed(*args: Any) -> Any:
        before.get(len(clock.ends) - 1, lambda: None)()
        done = step(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        clock.tick()
        return done

    return timed


if __name__ == "__main__":
    report(called(sys.argv[1:]))
