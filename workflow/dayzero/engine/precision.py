"""In which dtype is computed, stored and reduced."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from dayzero.engine.frozen import frozen_in_bf16


def mixed_precision_policy(precision: str, module: nn.Module) -> MixedPrecisionPolicy:
    """FSDP2's policy. bf16 gathers and computes in bfloat16; weights, gradients and their reduction stay float32.

    Buffers are left alone, so rotary tables keep their float32 values. Frozen weights of `module` that are kept in
    bfloat16 (see `frozen.py`) are cast where float32 is asked for.
    """
    if precision == "fp32":
        return MixedPrecisionPolicy(param_dtype=torch.float32 if frozen_in_bf16(module) else None)
    assert precision == "bf16", precision
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def autocast(precision: str, strategy: str, device: torch.device) -> AbstractContextManager[object]:
    """Where no FSDP2 policy casts (ddp, megatron_fsdp, none), bf16 means torch's autocast over float32 weights."""
    if precision == "bf16" and strategy != "fsdp2":
        # kept for the next use, the bfloat16 weights of all layers would stay on a rank that holds a share of them
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=strategy != "megatron_fsdp")
    return nullcontext()
