"""In which dtype is computed, stored and reduced."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy


def mixed_precision_policy(precision: str) -> MixedPrecisionPolicy:
    """FSDP2's policy. bf16 gathers and computes in bfloat16; weights, gradients and their reduction stay float32.

    Buffers are left alone, so rotary tables keep their float32 values.
    """
    if precision == "fp32":
        return MixedPrecisionPolicy()
    assert precision == "bf16", precision
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def autocast(precision: str, strategy: str, device: torch.device) -> AbstractContextManager[object]:
    """Where no FSDP2 policy casts (ddp, megatron_fsdp, none), bf16 means torch's autocast over float32 weights."""
    if precision == "bf16" and strategy != "fsdp2":
        # kept for the next use, the bfloat16 weights of all layers would stay on a rank that holds a share of them
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=strategy != "megatron_fsdp")
    return nullcontext()
