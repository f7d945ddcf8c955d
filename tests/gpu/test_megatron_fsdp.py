"""Megatron-FSDP on NVIDIA GPUs: its streams and NCCL, which no CPU has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.test_megatron_fsdp import check_megatron, run_megatron

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_megatron_fsdp_on_gpus(tmp_path: Path) -> None:
    check_megatron(run_megatron(tmp_path, min(torch.cuda.device_count(), 2)))
