"""Megatron-FSDP's own code with our wiring, on a CPU with streams that do nothing: see tests/gpu for the real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import MOE, Results, job, moe
from tests.distributed.launch import run_ranks
from tests.distributed.test_parity import check, check_moe
from tests.distributed.test_resume import copy_of

pytest.importorskip("megatron_fsdp", reason="needs the package megatron-fsdp")
pytestmark = pytest.mark.distributed

MEGATRON: dict[str, Any] = {"strategy": "megatron_fsdp", "local_batch_size": 2}
PACKED = ("qwen3", "full", "packed")


def run_megatron(folder: Path, ranks: int) -> Results:
    """Megatron-FSDP and the plain loop; then runs of FSDP2 and Megatron-FSDP, each continued by the other."""
    every: dict[str, Any] = {"train": {"checkpoint": {"every": 5, "keep_last": 2}}}
    recompute = {"train": {"activation_checkpointing": "full", "checkpoint": {"asynchronous": False}}}
    once = {"train": {"max_steps": None, "num_epochs": 1}}
    saved = {
        "fsdp2": job("train", *PACKED, folder, strategy="fsdp2", local_batch_size=2, **every),
        # each checkpoint is written when the next step has changed the weights: it must have been copied before
        "late": job("train_with_late_writes", *PACKED, folder, **MEGATRON, **every),
    }
    uneven = {
        name: {**job(name, "qwen3", "full", "uneven", folder, **MEGATRON, **once), "documents": 37}
        for name in ("reference", "train")
    }
    jobs = [
        *(job("reference", "qwen3", "full", rows, folder) for rows in ("padded", "packed")),
        job("train", "qwen3", "full", "padded", folder, **MEGATRON, **recompute),
        *(moe("reference", *case, folder) for case in MOE[::2]),
        *(moe("train", *case, folder, **MEGATRON) for case in MOE[::2]),
        job("bf16_logits", *PACKED, folder, **MEGATRON, train={"precision": "bf16"}),
    ]
    results = run_ranks(ranks, [*jobs, *saved.values(), *uneven.values()], folder / "first")
    results |= {name: results[run["name"]] for name, run in saved.items()}
    results |= {f"uneven-{name}": results[run["name"]] for name, run in uneven.items()}
    again = [
        copy_of(saved["late"], folder, "late-5", 5),
        copy_of(saved["late"], folder, "late-5-on-fsdp2", 5, strategy="fsdp2"),
        copy_of(saved["fsdp2"], folder, "fsdp2-5-on-megatron", 5, strategy="megatron_fsdp"),
    ]
    alone = [copy_of(saved["late"], folder, "late-5-on-1", 5)]
    return results | run_ranks(ranks, again, folder / "again") | run_ranks(1, alone, folder / "alone")


def check_megatron(results: Results) -> None:
    named = {name: got for name, got in results.items() if name.startswith(("train-", "reference-"))}
    check(named, named, 2)  # padded with recomputation by Megatron-FSDP, packed by FSDP2
    check({"train-qwen3-full-packed": results["late"]}, named, 1)
    check_moe(named, named, 2)
    for key in ("losses", "grad_norms"):
        torch.testing.assert_close(results["uneven-train"][key], results["uneven-reference"][key], rtol=1e-4, atol=0)
    logits = next(got for name, got in results.items() if name.startswith("bf16_logits"))
    torch.testing.assert_close(logits["float32"], logits["plain"], rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits["bf16"], logits["float32"])
    pairs = {"late-5": "late", "late-5-on-1": "late", "late-5-on-fsdp2": "late", "fsdp2-5-on-megatron": "fsdp2"}
    for continued, whole in pairs.items():
        assert results[continued]["started_at"] == 5
        torch.testing.assert_close(results[continued]["losses"], results[whole]["losses"], rtol=1e-5, atol=0)
        for key, tensor in results[whole]["weights"].items():
            torch.testing.assert_close(results[continued]["weights"][key], tensor, rtol=1e-4, atol=1e-5)
    assert results["late-5"]["losses"] == results["late"]["losses"]
    for key, tensor in results["late"]["weights"].items():
        assert torch.equal(results["late-5"]["weights"][key], tensor), key


def test_megatron_fsdp_equals_the_plain_loop_and_shares_checkpoints_with_fsdp2(tmp_path: Path) -> None:
    check_megatron(run_megatron(tmp_path, 2))
