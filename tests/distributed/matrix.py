"""The whole matrix of meshes, methods and rows, and its table: the largest difference of a loss from the plain loop."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.distributed.cases import job
from tests.distributed.launch import run_ranks

MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {"strategy": "ddp", "dp_replicate": 2}),
    "fsdp2": (2, {}),
    "hsdp": (4, {"dp_replicate": 2}),
    "tp": (2, {"tp": 2}),
    "tp, sequence_parallel": (2, {"tp": 2, "sequence_parallel": True}),
    "cp allgather": (2, {"cp": 2, "cp_method": "allgather"}),
    "cp ulysses": (2, {"cp": 2, "cp_method": "ulysses"}),
    "cp ring": (2, {"cp": 2, "cp_method": "ring"}),
    "pp 1f1b": (2, {"pp": 2, "pp_schedule": "1f1b"}),
    "pp interleaved": (2, {"pp": 2, "pp_schedule": "interleaved"}),
    "pp zero_bubble": (2, {"pp": 2, "pp_schedule": "zero_bubble"}),
    "ep": (2, {"ep": 2}),
    "fsdp2 x tp": (4, {"tp": 2}),
    "hsdp x tp": (4, {"dp_replicate": 2, "tp": 2}),
    "fsdp2 x cp": (4, {"cp": 2, "cp_method": "allgather"}),
    "pp x fsdp2": (4, {"pp": 2, "pp_schedule": "1f1b"}),
    "ep x fsdp2": (4, {"ep": 2}),
}
"""Ranks and sizes of each row; dp_shard is what is left of the ranks."""

MODELS = ("llama", "qwen3", "mixtral")
METHODS = ("full", "lora")
ROWS = ("padded", "packed")


def cells(mesh: str, folder: Path) -> list[dict[str, Any]]:
    """The jobs (see jobs.py) of one row of the matrix."""
    _, sizes = MESHES[mesh]
    models = ("mixtral",) if "ep" in sizes else MODELS
    return [cell("train", m, t, r, folder, **sizes) for m in models for t in METHODS for r in ROWS]


def references(folder: Path) -> list[dict[str, Any]]:
    """The plain loop for each model, method and kind of rows."""
    return [cell("reference", m, t, r, folder) for m in MODELS for t in METHODS for r in ROWS]


def cell(run: str, model: str, method: str, rows: str, folder: Path, **sizes: Any) -> dict[str, Any]:
    made = job(run, model, method, rows, folder, **{"strategy": "fsdp2", "local_batch_size": 1, **sizes})
    name = "-".join([run, model, method, rows])
    place = folder / "-".join([name, *(f"{k}={v}" for k, v in sizes.items())])
    return {**made, "name": name, "folder": str(place), "validate": False}


def run_mesh(mesh: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Train every cell of one row; results by the cell's name."""
    name = "".join(c if c.isalnum() else "_" for c in mesh)
    return run_ranks(MESHES[mesh][0], cells(mesh, folder), folder / name, timeout=1800)


def largest_loss_difference(got: dict[str, Any], want: dict[str, Any]) -> float:
    """Over the steps, as a share of the plain loop's loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(got["losses"], want["losses"], strict=True))


def table(differences: dict[tuple[str, str, str, str], float]) -> str:
    """Markdown. `differences`: (mesh, model, method, rows) -> largest loss difference."""
    worst: dict[tuple[str, str, str], float] = defaultdict(float)
    for (mesh, _, method, rows), value in differences.items():
        worst[mesh, method, rows] = max(worst[mesh, method, rows], value)
    columns = [(method, rows) for method in METHODS for rows in ROWS]
    head = ["mesh", "ranks", *(f"{method}, {rows}" for method, rows in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for mesh, (ranks, _) in MESHES.items():
        if any(key[0] == mesh for key in worst):
            values = [f"{worst[mesh, method, rows]:.1e}" for method, rows in columns]
            lines.append("| " + " | ".join([mesh, str(ranks), *values]) + " |")
    return "\n".join(lines) + "\n"
