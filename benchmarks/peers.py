"""transformers' Trainer and TRL's SFTTrainer on a benchmark's task: `python -m benchmarks.peers TASK.json WAY`.

TRL is no dependency: `pip install --no-deps --target DIR trl`, then PYTHONPATH=DIR.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.workload import Clock, Measured, Task, lengths_by_step, report

WAYS: dict[str, dict[str, Any]] = {
    "trl defaults": {"trainer": "trl", "dtype": "float32"},
    "trl packed": {"trainer": "trl", "packed": True, "gradient_checkpointing": False},
    "trl packed, 2 documents at a time": {
        "trainer": "trl", "packed": True, "gradient_checkpointing": False, "local_batch_size": 2,
    },
    "trl": {"trainer": "trl", "gradient_checkpointing": False},
    "trl liger": {"trainer": "trl", "gradient_checkpointing": False, "liger": True},
    "trainer padded": {"trainer": "transformers"},
    "trainer packed": {"trainer": "transformers", "packed": True},
    "trainer packed, 2 documents at a time": {"trainer": "transformers", "packed": True, "local_batch_size": 2},
    "trainer packed, 2 documents at a time, compiled": {
        "trainer": "transformers", "packed": True, "local_batch_size": 2, "compile": True,
    },
    "trainer": {"trainer": "transformers"},
    "trainer liger": {"trainer": "transformers", "liger": True},
    "plain loop": {"trainer": "loop"},
    "plain loop liger": {"trainer": "loop", "liger": True},
}  # fmt: skip
"""Settings of each peer. `dtype` of the weights as loaded is bfloat16 for adapters but in TRL's own defaults (float32),
and float32 where all are trained; all compute in bf16 autocast over adapters in float32, which is what PEFT makes of
them."""


class _Watch(TrainerCallback):
    def __init__(self) -> None:
        self.clock = Clock()
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.clock.tick()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def called(arguments: list[str]) -> Measured:
    """What the command does."""
    return run(Task(**json.loads(Path(arguments[0]).read_text())), arguments[1])


def run(task: Task, way: str) -> Measured:
    """Train `task` in the way of that name."""
    setting = WAYS[way]
    documents = task.read_documents()
    watch = _Watch()
    with tempfile.TemporaryDirectory() as folder:
        if setting["trainer"] == "loop":
            _loop(task, setting, documents, watch)
        else:
            make = _trl if setting["trainer"] == "trl" else _transformers
            make(task, setting, Dataset.from_list(documents), folder, watch).train()
    return Measured(
        way=way,
        **watch.clock.spans(),
        losses=watch.losses,
        num_tokens=lengths_by_step(task, documents),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
    )


def _model(task: Task, setting: dict[str, Any]) -> Any:
    dtype = setting.get("dtype", "bfloat16" if task.precision == "bf16" and task.adapter else "float32")
    model: Any = AutoModelForCausalLM.from_pretrained(task.model, dtype=getattr(torch, dtype))
    return PeftModel.from_pretrained(model, task.adapter, is_trainable=True) if task.adapter else model


def _local_batch_size(task: Task, setting: dict[str, Any]) -> int:
    return setting.get("local_batch_size", task.local_batch_size or task.batch_size)


def _arguments(task: Task, setting: dict[str, Any], folder: str) -> dict[str, Any]:
    local = _local_batch_size(task, setting)
    arguments = {
        "output_dir": folder,
        "max_steps": task.steps,
        "per_device_train_batch_size": local,
        "gradient_accumulation_steps": task.batch_size // local,
        "learning_rate": task.lr,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "bf16": task.precision == "bf16",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_liger_kernel": setting.get("liger", False),
        "torch_compile": setting.get("compile", False),
    }
    if "gradient_checkpointing" in setting:
        arguments["gradient_checkpointing"] = setting["gradient_checkpointing"]
    return arguments


def _loop(task: Task, setting: dict[str, Any], documents: list[dict[str, list[int]]], watch: _Watch) -> None:
    """A loop as people write it by hand: PEFT's model, padded batches, all logits, AdamW."""
    if setting.get("liger"):
        from liger_kernel.transformers import AutoLigerKernelForCausalLM as Loader
    else:
        Loader = AutoModelForCausalLM
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = task.precision == "bf16"
    model: Any = Loader.from_pretrained(task.model, dtype=torch.bfloat16 if bf16 and task.adapter else torch.float32)
    if task.adapter:
        model = PeftModel.from_pretrained(model, task.adapter, is_trainable=True)
    model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(task.model), padding=True)
    local = _local_batch_size(task, setting)
    watch.clock.start()
    for start in range(0, len(documents), task.batch_size):
        rows = documents[start : start + task.batch_size]
        labels = sum(sum(label >= 0 for label in row["labels"][1:]) for row in rows)
        loss_sum = torch.zeros((), device=device)
        for at in range(0, len(rows), local):
            batch = {k: v.to(device) for k, v in collate([dict(row) for row in rows[at : at + local]]).items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = model(**batch, use_cache=False, num_items_in_batch=labels).loss
            loss.backward()
            loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.losses.append(loss_sum.item())
        watch.clock.tick()


def _transformers(task: Task, setting: dict[str, Any], rows: Dataset, folder: str, watch: _Watch) -> Any:
    padded = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(task.model), padding=True)
    return Trainer(
        model=_model(task, setting),
        args=TrainingArguments(**_arguments(task, setting, folder)),
        train_dataset=rows,
        data_collator=DataCollatorWithFlattening() if setting.get("packed") else padded,
        callbacks=[watch],
    )


def _trl(task: Task, setting: dict[str, Any], rows: Dataset, folder: str, watch: _Watch) -> Any:
    from trl import SFTConfig, SFTTrainer

    # its own packing would deal other documents to a step; a flattened batch is what that packing feeds the model
    packed = {"padding_free": True} if setting.get("packed") else {}
    whole = {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}  # documents as they are
    arguments = SFTConfig(**_arguments(task, setting, folder), **whole, **packed)
    return SFTTrainer(
        model=_model(task, setting),
        args=arguments,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(task.model),
        callbacks=[watch],
    )


if __name__ == "__main__":
    report(called(sys.argv[1:]))
