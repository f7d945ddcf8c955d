"""AdamW with moments of 8 bits (Dettmers et al. 2021, https://arxiv.org/abs/2110.02861), from torchao.

Moments are kept in blocks of codes with one scale each. torchao cuts a rank's share into blocks of 256 elements
wherever rows end, so that blocks depend on the number of ranks. Here blocks end with rows: a checkpoint of codes and
scales can then be read on any number of ranks that split rows, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dayzero.engine.sharded import like, local, some_rank_is_empty, with_last_dim, zeros

BLOCK = 256
"""Most elements that share a scale."""

SMALLEST_BLOCK = 32
"""A row that does not divide into blocks of at least this many keeps its moments in float32."""

SMALLEST = 4096
"""Parameters with fewer elements keep their moments in float32, as in bitsandbytes."""


def build_adamw8bit(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """torchao's AdamW8bit over `groups`, with blocks that end with rows."""
    from torchao.optim import AdamW8bit
    from torchao.optim.subclass_8bit import OptimState8bit

    class RowBlocks(AdamW8bit):
        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            share = local(p)
            if not (block := block_size(p)):
                return zeros(p, torch.float32)
            return like(p, OptimState8bit.zeros(share.shape, signed, block, share.device, dtype=torch.float32))

        def step(self, closure: Any = None) -> None:
            with _compiled_on_gpus(self.param_groups[0]["params"][0]):
                super().step(closure)

    return RowBlocks(groups, **options)


def block_size(parameter: Tensor) -> int:
    """Elements of this rank's rows that share a scale, a divisor of the row; 0: moments in float32."""
    if parameter.ndim < 2 or parameter.numel() < SMALLEST or some_rank_is_empty(parameter):
        return 0
    row = local(parameter).shape[-1]
    return next((n for n in range(min(BLOCK, row), SMALLEST_BLOCK - 1, -1) if row % n == 0), 0)


def stored_parts(parameter: Tensor, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """An optimizer's value as plain (sharded) tensors that share its memory: codes and scales where it has 8 bits.

    codes are split like the parameter, scales [..., blocks of a row] too.
    """
    share: Any = local(value)
    block = block_size(parameter)
    if hasattr(share, "codes"):
        rows = *share.shape[:-1], share.shape[-1] // block
        yield f"{name}.codes", like(parameter, share.codes)
        yield f"{name}.scale", with_last_dim(parameter, share.scale.view(rows), parameter.shape[-1] // block)
    else:
        yield name, value


def _compiled_on_gpus(parameter: Tensor) -> AbstractContextManager[Any]:
    """torchao compiles its step; on a CPU that takes longer than it saves, so there it runs as it is written."""
    return nullcontext() if parameter.device.type == "cuda" else torch.compiler.set_stance("force_eager")
