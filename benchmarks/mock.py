"""A model of random weights and documents of random tokens for a benchmark: `python -m benchmarks.mock TASK.json`.

TASK.json: the `task` and what to `make` for it. Reports the operations of a step and the device's peak.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dayzero.config import Method
from dayzero.engine.device_peaks import peak_flops
from dayzero.engine.distributed import local_device
from dayzero.engine.flops import count_flops
from dayzero.engine.lora import save_adapter
from dayzero.engine.model import ModelSource, build_model
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.workload import Measured, Task, report


def called(arguments: list[str]) -> Measured:
    """What the command does."""
    wanted = json.loads(Path(arguments[0]).read_text())
    task, make = Task(**wanted["task"]), wanted["make"]
    device = local_device()
    write_model(task, make["fields"], device)
    write_documents(task, make["fields"]["vocab_size"], make["seq_len"], make["method"])
    lora = {"rank": task.rank, "alpha": task.alpha}
    method = Method(name="lora", lora=lora) if task.adapter else Method(name="full")  # type: ignore[arg-type]
    source = ModelSource(directory=Path(task.model))
    model = build_model(source, source.config(), method, 0, meta=True)
    if task.adapter:
        from dayzero.engine.weights import Weights

        adapters = {n: torch.empty_like(p, device="cpu") for n, p in model.named_parameters() if p.requires_grad}
        Weights(source, source.config(), method, 0).fill(adapters)
        save_adapter(Path(task.adapter), method.lora, adapters, base_model=task.model)
    labels = task.batch_size * (make["seq_len"] if make["method"] != "full" else make["seq_len"] // 2)
    tokens = task.batch_size * make["seq_len"]
    pairs = task.batch_size * make["seq_len"] * (make["seq_len"] + 1) // 2
    flops = count_flops(model)
    assert set(flops.per_pair) <= {None}, "a model with sliding windows"
    extra: dict[str, Any] = {
        "flops_per_step": flops.of(tokens, labels, {None: pairs}),
        "peak_flops": peak_flops(device, task.precision),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "a CPU",
    }
    return Measured(way="mock", step_seconds=[], step_cpu_seconds=[], losses=[], num_tokens=[], extra=extra)


def write_model(task: Task, fields: dict[str, Any], device: torch.device) -> None:
    """A Hugging Face directory in bfloat16, with a tokenizer that knows no text (peers ask for one)."""
    with device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.bfloat16)
    model.save_pretrained(task.model)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(task.model)


def write_documents(task: Task, vocab_size: int, seq_len: int, method: str) -> None:
    """Random tokens; with method full only the second half of each document is supervised."""
    rng = np.random.default_rng(0)
    with open(task.documents, "w") as file:
        for _ in range(task.batch_size * task.steps):
            ids = rng.integers(2, vocab_size, seq_len).tolist()
            first = seq_len // 2 if method == "full" else 1
            labels = [-100] * first + ids[first:]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


if __name__ == "__main__":
    report(called(sys.argv[1:]))
