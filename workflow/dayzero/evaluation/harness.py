"""Scores of an exported model by lm-eval: the tasks, the model, the results and every sample behind them."""

from __future__ import annotations

import math
import os
import random
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dayzero.config import Evaluate
from dayzero.console import log
from dayzero.errors import ConfigError, DataError
from dayzero.files import sha256_json

BOOTSTRAP_ITERATIONS = 1000
"""For the few metrics whose stderr has no formula."""


def evaluate_model(
    config: Evaluate, model: Path, data: Path, tasks_dir: Path, trust_remote_code: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the Hugging Face directory `model` on the configured tasks, with lm-eval.

    Returns (results, samples): results as eval/results.json holds them, without provenance; samples one for each item
    and task, with prompt, answer, target and the item's metrics, from which the scores can be computed again.
    Raises ConfigError for unknown tasks, missing data, a directory without a model or code of it that may not be run.
    """
    names = list(dict.fromkeys([*config.tasks, *config.extra_tasks]))
    started = time.monotonic()
    results: dict[str, Any] = {"tasks": {}, "model": str(model)}
    samples: list[dict[str, Any]] = []
    if names:
        if not (model / "config.json").is_file():
            raise ConfigError(f"{model} holds no exported model (no config.json): run the export stage first")
        results["chat_template"], outcome, truncated = _run(config, names, model, data, tasks_dir, trust_remote_code)
        for task, items in outcome["samples"].items():
            samples += [_sample(task, item, truncated) for item in items]
        for task in sorted(outcome["results"], key=lambda name: names.index(name) if name in names else len(names)):
            results["tasks"][task] = _task(task, outcome, [s for s in samples if s["task"] == task])
    else:
        log.info("evaluate.tasks is empty: nothing to score")
    results["seconds"] = round(time.monotonic() - started, 2)
    return results, samples


def _run(
    config: Evaluate, names: list[str], model: Path, data: Path, tasks_dir: Path, trust: bool
) -> tuple[bool, dict[str, Any], dict[str, bool]]:
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars; ours is the one to show
    import datasets
    import numpy as np
    import torch
    import transformers
    from lm_eval import evaluator

    from dayzero.evaluation.model import ExactLM
    from dayzero.evaluation.tasks import load_tasks
    from dayzero.pretrained import load_causal_lm

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    with tempfile.TemporaryDirectory(prefix="dayzero-tasks-") as work_dir:
        tasks = load_tasks(names, tasks_dir, data, Path(work_dir))
        for task in tasks["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=config.seed)
        # answers first: likelihoods of the same prompts are then nearly free
        order = sorted(tasks["tasks"].items(), key=lambda item: item[1].OUTPUT_TYPE != "generate_until")
        tasks["tasks"] = dict(order)
        # lm-eval would fill missing weights with random values and go on
        load_causal_lm(model, device_map="meta", trust_remote_code=trust)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
        chat = tokenizer.chat_template is not None
        lm = ExactLM(model, dtype=config.dtype, batch_size=config.batch_size, chat=chat, trust_remote_code=trust)
        lm.tasks = list(tasks["tasks"].values())
        log.info(
            "%s on %s in %s, prompts %s",
            ", ".join(tasks["tasks"]),
            lm.device,
            lm.model.dtype,
            "by the model's chat template" if chat else "as plain text",
        )
        outcome = evaluator.evaluate(
            lm=lm,
            task_dict=tasks,
            limit=config.limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    assert outcome is not None
    return chat, dict(outcome), lm.truncated


def _sample(task: str, item: dict[str, Any], truncated: dict[str, bool]) -> dict[str, Any]:
    """One line of samples.jsonl."""
    prompt = item["arguments"][0][0]
    answers = item["filtered_resps"]
    doc = item["doc"] if isinstance(item["doc"], dict) else {}
    sample = {
        "task": task,
        "doc_id": item["doc_id"],
        "id": doc.get("id"),
        "filter": item["filter"],
        "doc_sha256": item["doc_hash"],
        "prompt": prompt,
        "answer": _plain(answers[0] if len(answers) == 1 else answers),
        "target": _plain(item["target"]),
        "metrics": {name: _plain(item[name]) for name in item["metrics"]},
    }
    if isinstance(sample["answer"], str):
        sample["truncated"] = truncated.get(prompt, False)
    return sample


def _task(task: str, outcome: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """One entry of results.json; groups of tasks have no samples of their own."""
    metrics: dict[str, Any] = {}
    for key, value in outcome["results"][task].items():
        name, _, filter_name = key.partition(",")
        if not filter_name or name.endswith("_stderr") or isinstance(value, str):
            continue
        if not math.isfinite(value):
            raise DataError(f"task {task}: {name} is {value}, so the model's logits are not finite; train it again")
        stderr = outcome["results"][task].get(f"{name}_stderr,{filter_name}")
        metrics[name if filter_name == "none" else key] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
            "higher_is_better": outcome["higher_is_better"].get(task, {}).get(name),
        }
    first_filter = samples[0]["filter"] if samples else None
    items = sorted((s for s in samples if s["filter"] == first_filter), key=lambda s: s["doc_id"])
    entry = {
        "version": outcome["versions"].get(task),
        "num_items": len(items) or outcome["results"][task].get("sample_len"),
        "num_fewshot": outcome["n-shot"].get(task),
        "items_sha256": sha256_json([s["doc_sha256"] for s in items]) if items else None,
        "metrics": metrics,
    }
    if cut := [s["truncated"] for s in items if "truncated" in s]:
        entry["truncated_share"] = sum(cut) / len(cut)
    return entry


def _plain(value: Any) -> Any:
    """JSON values of what lm-eval returns: numpy scalars as numbers, tuples as lists."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, Iterable):
        return [_plain(v) for v in value]
    return value.item() if hasattr(value, "item") else value
