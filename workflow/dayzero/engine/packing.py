"""Does a model keep packed documents apart? Asked of the model itself, since the failure is silent.

Attention over position ids that restart is masked by transformers; state-space, convolution and compression layers
carry what they saw into the next document. No table of architectures: the loaded model is tried.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
"""Differences that are rounding, as a share of the largest logit. In float32 leaks were seen from 6e-4 upwards and
noise up to 1.2e-7; in bf16 experts may be grouped differently, which rounds differently."""


def packing_leak(logits: Callable[[Tensor, Tensor], Tensor], vocab_size: int, precision: str) -> float | None:
    """How far a document's logits move when another document of its row changes or goes away; None if they stay.

    `logits(input_ids, position_ids)` ([B, T] both) gives [B, T, V]. The result is a share of the largest logit.
    """
    generator = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(0, vocab_size, (3, 1, 12), generator=generator)
    alone = torch.arange(12).unsqueeze(0)
    positions = torch.cat([alone, alone], dim=1)
    packed = logits(torch.cat([first, second], dim=1), positions)[:, 12:]
    edited = logits(torch.cat([other, second], dim=1), positions)[:, 12:]
    standalone = logits(second, alone)
    scale = standalone.abs().max().clamp(min=1e-6)
    leak = max(((packed - edited).abs().max() / scale).item(), ((packed - standalone).abs().max() / scale).item())
    return leak if not leak <= TOLERANCE[precision] else None
