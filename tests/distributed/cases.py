"""What is trained in the tests of this folder: models, methods and rows, as jobs for `jobs.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed.optimizers import HAS_TORCHAO

PP: dict[str, Any] = {"strategy": "fsdp2", "pp": 2}

Results = dict[str, dict[str, Any]]

CASES = [(m, t, r) for m in ("llama", "qwen3") for t in ("full", "lora") for r in ("padded", "packed")]

REPRESENTATIVE = [CASES[0], CASES[3], CASES[5], CASES[6]]
"""Each pair of model, method and rows once."""

MOE = [
    ("mixtral", "full", "packed"),
    ("mixtral", "lora", "padded"),
    ("qwen3_moe", "full", "padded"),
    ("qwen3_moe", "lora", "packed"),
]

SEEDS = {("qwen3_moe", "full"): 12, ("qwen3_moe", "lora"): 5}
"""Initial weights with which no token's last chosen expert is within 1.5e-5 of the next one in any step: a closer
choice hangs on the order in which sums are rounded, and another expert is another curve."""

FP8: list[tuple[tuple[str, str], dict[str, Any]]] = [
    (("qwen3", "lora"), {"precision": "bf16", "fp8": {"emulate": True}}),
    *(
        [(("llama", "full"), {"precision": "bf16", "fp8": {"emulate": True, "all_gather": True}})]
        if HAS_TORCHAO
        else []
    ),
]
"""Frozen weights quantised once, trained ones gathered in 8 bits."""

FP8_CURVES: list[tuple[tuple[str, str, str], dict[str, Any]]] = [
    ((model, method, "packed"), {"precision": "bf16", "fp8": {"emulate": True, **more}})
    for model, method in (("qwen3", "lora"), ("llama", "full"))
    for more in ({"recipe": "tensorwise"}, {"recipe": "rowwise"}, {"recipe": "tensorwise", "all_gather": True})
    if method == "lora" or HAS_TORCHAO
    if method == "full" or "all_gather" not in more
]
"""Whole curves: each recipe with frozen and trained weights, and gathered in 8 bits."""

WITHOUT_PLAN = [("stablelm", "full", "padded"), ("opt", "lora", "padded")]
"""Models that ship no tensor-parallel plan: grouped queries; biases and the MLP in the layer itself. The second trains
adapters, since the plain loop would decay its table of positions."""


VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dora": ("qwen3", "padded", {"lora": {"dora": True, "rank": 4}}),
    "rslora": ("llama", "packed", {"lora": {"rslora": True, "rank": 4}}),
    "qlora": ("qwen3", "packed", {"name": "qlora", "lora": {"rank": 4}}),
    "whole": ("qwen3", "padded", {"lora": {"modules_to_save": ["embed_tokens", "lm_head"], "rank": 4}}),
    "whole_tied": ("llama", "padded", {"lora": {"modules_to_save": ["embed_tokens"], "rank": 4}}),
    "z_loss": ("qwen3", "packed", {"train": {"z_loss": 0.01}}),
    "ema": ("llama", "packed", {"train": {"ema": {"decay": 0.8}}}),
    "kd": ("qwen3", "packed", {"kd": {"teacher": "llama", "temperature": 2.0, "weight": 0.5}}),
    "frozen": ("qwen3", "packed", {"freeze": ["model.embed_tokens.*", "*.layers.[01].*"]}),
}
"""Other ways to train: model, rows, options of the method and of training."""


def job(run: str, model: str, method: str, rows: str, folder: Path, **more: Any) -> dict[str, Any]:
    name = "-".join(str(v) for v in (run, model, method, rows, *(v for v in more.values() if not isinstance(v, dict))))
    name += "".join(f"-{k}={v}" for d in more.values() if isinstance(d, dict) for k, v in d.items())
    return {
        "name": name,
        "run": run,
        "model": model,
        "method": method,
        "packed": rows == "packed",
        "rows": str(folder / f"rows-{rows}"),
        "folder": str(folder / name),
        "validate": run == "train",
        **more,
    }


def uneven(run: str, folder: Path, **more: Any) -> dict[str, Any]:
    """One pass over 37 rows, 8 to a step: the fifth step has five."""
    once = {"max_steps": None, "num_epochs": 1}
    return {**job(run, "llama", "full", "uneven", folder, train=once, **more), "documents": 37}


def moe(run: str, model: str, method: str, rows: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Mixtral with its auxiliary loss, over 78 rows so that the tenth step has six of 8; Qwen3-MoE without."""
    short = {"max_steps": None, "num_epochs": 3.9 if rows == "packed" else 1.95}
    train = {"router_aux_loss_coef": 0.1, **short} if model == "mixtral" else {}
    made = job(run, model, method, rows, folder, train=train, **more)
    made["name"] = "-".join([run, model, method, rows, *(f"{k}={v}" for k, v in more.items())])
    seed = {"seed": SEEDS[model, method]} if (model, method) in SEEDS else {}
    return {**made, "folder": str(folder / made["name"]), **seed}


def variant(run: str, label: str, folder: Path, **more: Any) -> dict[str, Any]:
    model, rows, options = VARIANTS[label]
    options = dict(options)
    train = options.pop("train", {}) | more.pop("train", {})
    made = job(run, model, label, rows, folder, **more)
    if "kd" in options:
        made["teacher"] = options["kd"]["teacher"]
    method = options.pop("name", None) or next((name for name in ("lora", "kd") if name in options), "full")
    return {**made, "method": method, "method_options": options, "train": train}


def setting(folder: Path, **train: Any) -> dict[str, Any]:
    return job("train", "llama", "full", "packed", folder, strategy="fsdp2", local_batch_size=4, train=train)
