"""The engine on one GPU (nccl): against the plain loop on the CPU by the tests of `test_parity.py`, resumed against
never interrupted, and in low precision against float32."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.cases import Results, job
from tests.distributed.launch import run_ranks
from tests.distributed.test_parity import (  # noqa: F401
    folder,
    one,
    test_a_model_whose_packed_documents_leak_is_found,
    test_global_batch_does_not_depend_on_the_local_batch,
    test_one_process_equals_the_plain_loop,
    test_settings_that_must_not_change_the_curve,
    test_training_lowers_the_loss,
)
from tests.distributed.test_resume import OPTIMIZERS, copy_of
from tests.gpu.test_precision_and_kernels import HAS_FLOAT8

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

TENSORWISE, ROWWISE = ({"precision": "bf16", "fp8": {"recipe": r}} for r in ("tensorwise", "rowwise"))
LOW: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "compiled": {"precision": "bf16", "compile": True},
    "pure": {"precision": "bf16_pure"},
    "tensorwise": TENSORWISE,
    "rowwise": ROWWISE,
    "gathered_tensorwise": {"precision": "bf16", "fp8": {"recipe": "tensorwise", "all_gather": True}},
    "transformer_engine": {"precision": "bf16", "fp8": {"backend": "transformer_engine", "recipe": "delayed"}},
    "compiled_tensorwise": {**TENSORWISE, "compile": True},
    "compiled_rowwise": {**ROWWISE, "compile": True},
}


def can_run(name: str, method: str) -> bool:
    """Whether this machine can, and what is frozen is not to be gathered."""
    if "fp8" not in LOW.get(name, {}):
        return True
    installed = name != "transformer_engine" or find_spec("transformer_engine") is not None
    return HAS_FLOAT8 and installed and (method == "full" or "gathered" not in name)


@pytest.fixture(scope="module")
def low(folder: Path) -> Results:  # noqa: F811
    jobs = []
    for method in ("full", "lora"):
        for name, train in {"fp32": {"precision": "fp32"}, **LOW}.items():
            if can_run(name, method):
                made = job("train", "qwen3", method, "packed", folder, strategy="fsdp2", train=train)
                jobs.append({**made, "name": f"{method}-{name}", "folder": str(folder / f"low-{method}-{name}")})
        if HAS_FLOAT8:
            probe = job("leak", "qwen3", method, "packed", folder, strategy="fsdp2", train=LOW["compiled_tensorwise"])
            jobs.append({**probe, "name": f"{method}-leak"})
    return run_ranks(1, jobs, folder / "low")


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", LOW)
def test_low_precision_follows_the_float32_curve(low: Results, method: str, name: str) -> None:
    if not can_run(name, method):
        pytest.skip("needs a GPU of compute capability 8.9, the package, and weights that are gathered")
    got, want = low[f"{method}-{name}"]["losses"], low[f"{method}-fp32"]["losses"]
    assert got != want
    torch.testing.assert_close(got, want, rtol=1e-2 if "fp8" in LOW[name] else 2e-3, atol=0)


@pytest.mark.skipif(not HAS_FLOAT8, reason="needs a GPU of compute capability 8.9")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_one_scale_for_all_tokens_is_no_leak(low: Results, method: str) -> None:
    assert low[f"{method}-leak"]["leak"] is None


def test_resumed_equals_never_interrupted(folder: Path) -> None:  # noqa: F811
    settings: dict[str, Any] = {"strategy": "fsdp2", "local_batch_size": 2}
    every = {"checkpoint": {"every": 5, "keep_last": 20}, "ema": {"decay": 0.8}}
    whole = [
        job("train", "llama", "full", "packed", folder, **settings, train={**every, "num_data_workers": 2}),
        job("train", "qwen3", "lora", "padded", folder, **settings, train=every,
            method_options={"lora": {"rank": 4, "dropout": 0.2}}),
    ]  # fmt: skip
    for name, options in OPTIMIZERS.items():
        train = {**every, "optimizer": {"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-6, **options}}
        whole.append(job("train", "qwen3", "full", "packed", folder, **settings, train=train, optimizer=name))
    for number, made in enumerate(whole):
        made |= {"name": f"whole-{number}", "folder": str(folder / f"whole-{number}")}
    wanted = run_ranks(1, whole, folder / "whole")
    again = [copy_of(run, folder, f"again-{number}", 5) for number, run in enumerate(whole)]
    found = run_ranks(1, again, folder / "again")
    for number in range(len(whole)):
        got, want = found[f"again-{number}"], wanted[f"whole-{number}"]
        assert got["started_at"] == 5
        torch.testing.assert_close(got["losses"], want["losses"], rtol=1e-6, atol=0)
        for key, tensor in want["weights"].items():
            torch.testing.assert_close(got["weights"][key], tensor, rtol=1e-5, atol=1e-6)
