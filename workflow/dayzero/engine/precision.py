"""In which dtype is computed, stored and reduced."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy


def computes_in_bf16(precision: str) -> bool:
    """Whether activations are bfloat16."""
    return precision in ("bf16", "bf16_pure")


def weights_dtype(precision: str) -> torch.dtype:
    """In which dtype weights are kept between steps."""
    return torch.bfloat16 if precision == "bf16_pure" else torch.float32


def mixed_precision_policy(precision: str, module: nn.Module) -> MixedPrecisionPolicy:
    """FSDP2's policy. bf16 gathers and computes in bfloat16; gradients are reduced in float32 and kept in the weights'
    dtype.

    Buffers are left alone, so rotary tables keep their float32 values. Weights of `module` that are kept in bfloat16
    are cast where float32 is asked for.
    """
    if not computes_in_bf16(precision):
        low = any(p.dtype == torch.bfloat16 for p in module.parameters())
        return MixedPrecisionPolicy(param_dtype=torch.float32 if low else None)
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def autocast(precision: str, strategy: str, device: torch.device) -> AbstractContextManager[object]:
    """Where no FSDP2 policy casts (ddp, megatron_fsdp, none), bf16 means torch's autocast over float32 weights."""
    if computes_in_bf16(precision) and strategy != "fsdp2":
        # kept for the next use, the bfloat16 weights of all layers would stay on a rank that holds a share of them
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=strategy != "megatron_fsdp")
    return nullcontext()
