"""What makes training fast, on an NVIDIA GPU: the fused LoRA operation in bf16, MFU, and the benchmark's own code."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dayzero.config import Lora
from dayzero.engine.device_peaks import peak_flops, peak_of_name
from dayzero.engine.lora_linear import fuse_lora

from tests.unit.test_lora_linear import adapted

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

ROOT = Path(__file__).parents[2]


def test_the_fused_lora_operation_is_no_further_from_the_truth_than_peft_on_a_gpu() -> None:
    peft = adapted("llama", Lora(rank=3), torch.bfloat16).to(torch.bfloat16).cuda()
    fused = copy.deepcopy(peft)
    assert fuse_lora(fused) > 20
    ids = torch.randint(0, 128, (4, 64), device="cuda")
    wanted = copy.deepcopy(peft).to(torch.float64)
    wanted(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    errors = []
    for model in (peft, fused):
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        pairs = zip(model.parameters(), wanted.parameters(), strict=True)
        misses = [(p.grad.double() - q.grad).norm() / q.grad.norm() for p, q in pairs if p.grad is not None]
        errors.append(torch.stack(misses).mean().item())
    assert errors[1] < 1.2 * errors[0] < 0.2


def test_the_peak_of_a_listed_gpu_is_known_in_bf16_only() -> None:
    device = torch.device("cuda", 0)
    assert peak_flops(device, "bf16") == peak_of_name(torch.cuda.get_device_name(device))
    assert peak_flops(device, "fp32") is None


def test_the_gpu_benchmark_runs_tiny_shapes_on_the_gpu() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/train_gpu.py"), "--self-check"]
    done = subprocess.run(
        [*command, "--cases", "llama-3.1-8b-lora", "llama-3.2-1b-pretrain"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "failed" not in done.stdout, done.stdout
