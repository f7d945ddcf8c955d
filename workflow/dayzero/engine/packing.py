"""Does a model keep packed documents apart? Asked of the model itself, since the failure is silent.

Attention over position ids that restart is masked by transformers; state-space, convolution and compression layers
carry what they saw into the next document. No table of architectures: the loaded model is tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

EDITED = {"fp32": 1e-5, "bf16": 1e-3}
"""Rounding, as a share of the largest logit, when only another document's tokens change: shapes and kernels stay the
same, so what is kept apart stays the same to the bit but for experts that are grouped differently. In float32 leaks
were seen from 6e-4 upwards and noise up to 1.2e-7."""

ALONE = {"fp32": 1e-4, "bf16": 0.1}
"""Rounding when the other document goes away: other shapes take other kernels. Finds models that keep documents apart
from one another's tokens but not from one another's presence."""


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
    moved_by_edit = ((packed - edited).abs().max() / scale).item()
    moved_by_removal = ((packed - standalone).abs().max() / scale).item()
    if math.isnan(moved_by_edit + moved_by_removal):
        return None  # broken weights: the first step says so
    if moved_by_edit <= EDITED[precision] and moved_by_removal <= ALONE[precision]:
        return None
    return max(moved_by_edit, moved_by_removal)
