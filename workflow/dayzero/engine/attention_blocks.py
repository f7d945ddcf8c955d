"""Attention over one block of a row's keys, which with other blocks' makes up the whole row's.

The forward pass gives, beside the output, the log of the sum of the exponentials of each query's scores, by which
blocks are put together; the backward pass takes that of all blocks together (Dao 2023, https://arxiv.org/abs/2307.08691,
section 3.1), so that no block's scores are kept. torch's own kernels do both, where they are found to be right.

Shapes: B rows, H query heads, K key and value heads, L queries, S keys, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from dayzero.console import log
from dayzero.engine.difference import relative_difference
from dayzero.errors import one_line

QUERIES = 512
"""The plain way holds the scores of so many queries at a time."""
_KEYS_ALIGNED, _QUERIES_ALIGNED = 16, 32
"""What torch's CUDA kernel wants the bias's rows and the log-sums to be multiples of."""
_NEAR = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far a kernel may be from the plain way, as a share of the largest value."""


@dataclass(frozen=True)
class Block:
    """Queries and the keys and values of one block."""

    query: Tensor
    """[B, H, L, E]"""
    key: Tensor
    """[B, K, S, E]"""
    value: Tensor
    """[B, K, S, E]"""
    seen: Tensor
    """[B, 1, L, S] bool: whether a query may see a key. It may see none of a block."""
    scale: float

    @property
    def bias(self) -> Tensor:
        """[B, 1, L, S], added to scores: the lowest number rather than -inf, so that a query may see nothing."""
        zeros = torch.zeros(self.seen.shape, dtype=self.query.dtype, device=self.query.device)
        return zeros.masked_fill_(~self.seen, torch.finfo(self.query.dtype).min)

    def repeated(self) -> tuple[Tensor, Tensor]:
        """Keys and values with as many heads as the queries, [B, H, S, E]."""
        times = self.query.shape[1] // self.key.shape[1]
        return self.key.repeat_interleave(times, dim=1), self.value.repeat_interleave(times, dim=1)


class BlockAttention(Protocol):
    """Both passes over one block."""

    def forward(self, block: Block) -> tuple[Tensor, Tensor]:
        """The block's output [B, H, L, E] and log-sum-exp [B, H, L]."""

    def backward(self, block: Block, gradient: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value by this block, from that of the output [B, H, L, E]; `output` and `lse`
        are those of all blocks together."""


class Plain:
    """By matrix products, a few queries at a time, in at least float32."""

    def forward(self, block: Block) -> tuple[Tensor, Tensor]:
        value = _wide(block.repeated()[1])
        parts = [(scores.softmax(-1) @ value, scores.logsumexp(-1)) for _, scores in self._scores(block)]
        output, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        return output.to(block.query.dtype), lse

    def backward(self, block: Block, gradient: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = map(_wide, block.repeated())
        of_query, of_key, of_value = [], torch.zeros_like(key), torch.zeros_like(value)
        rest = zip(*(x.split(QUERIES, dim=2) for x in (_wide(gradient), _wide(output), lse)), strict=True)
        for (query, scores), (by_output, out, total) in zip(self._scores(block), rest, strict=True):
            weights = (scores - total.unsqueeze(-1)).exp()
            share = (by_output * out).sum(-1, keepdim=True)
            by_score = weights * (by_output @ value.transpose(-1, -2) - share) * block.scale
            of_query.append(by_score @ key)
            of_key += by_score.transpose(-1, -2) @ query
            of_value += weights.transpose(-1, -2) @ by_output
        return torch.cat(of_query, dim=2), _by_key_head(of_key, block), _by_key_head(of_value, block)

    def _scores(self, block: Block) -> Iterator[tuple[Tensor, Tensor]]:
        """Some queries at a time and their scores."""
        key = _wide(block.repeated()[0])
        for query, bias in zip(block.query.split(QUERIES, dim=2), block.bias.split(QUERIES, dim=2), strict=True):
            yield _wide(query), _wide(query) @ key.transpose(-1, -2) * block.scale + bias


class FlashOnCPU:
    """torch's flash attention for CPUs."""

    def forward(self, block: Block) -> tuple[Tensor, Tensor]:
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, lse = run(block.query, block.key, block.value, 0.0, False, attn_mask=block.bias, scale=block.scale)
        return output, lse

    def backward(self, block: Block, gradient: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        given = gradient, block.query, block.key, block.value, output, lse
        of_query, of_key, of_value = run(*given, 0.0, False, attn_mask=block.bias, scale=block.scale)
        return of_query, of_key, of_value


class EfficientOnCUDA:
    """torch's memory-efficient attention for NVIDIA GPUs, which has as many key heads as query heads."""

    def forward(self, block: Block) -> tuple[Tensor, Tensor]:
        run = torch.ops.aten._scaled_dot_product_efficient_attention
        output, lse, *_ = run(block.query, *block.repeated(), self._bias(block), True, 0.0, False, scale=block.scale)
        return output, lse[:, :, : block.query.shape[2]]

    def backward(self, block: Block, gradient: Tensor, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        run = torch.ops.aten._scaled_dot_product_efficient_attention_backward
        lse = F.pad(lse, (0, -lse.shape[2] % _QUERIES_ALIGNED), value=float("inf"))
        # in bfloat16 the kernel takes the output to lie [B, L, H, E] in memory, whatever its strides say (o_strideM in
        # ATen/native/transformers/cuda/mem_eff_attention/kernel_backward.h)
        output = output.transpose(1, 2).contiguous().transpose(1, 2)
        given = gradient, block.query, *block.repeated(), self._bias(block), output, lse
        seed = offset = torch.zeros((), dtype=torch.long, device=lse.device)  # of the dropout, which is 0
        wanted = [True, True, True, False]
        of_query, of_key, of_value, _ = run(*given, seed, offset, 0.0, wanted, False, scale=block.scale)
        return of_query, _by_key_head(of_key, block), _by_key_head(of_value, block)

    def _bias(self, block: Block) -> Tensor:
        keys = block.key.shape[2]
        aligned = F.pad(block.bias, (0, -keys % _KEYS_ALIGNED))[..., :keys]
        return aligned.expand(-1, block.query.shape[1], -1, -1)


def block_attention(query: Tensor) -> BlockAttention:
    """The fastest way for queries like these [B, H, L, E]; the plain one where torch's kernel is not right for them."""
    return _chosen(query.device.type, query.dtype, query.shape[-1])


@lru_cache
def _chosen(device: str, dtype: torch.dtype, width: int) -> BlockAttention:
    kernels: dict[str, BlockAttention] = {"cpu": FlashOnCPU(), "cuda": EfficientOnCUDA()}
    if device not in kernels:
        return Plain()
    try:
        # not recorded by selective activation checkpointing: a layer computed again does not try the kernel again
        with _disable_current_modes():
            moved = difference(kernels[device], device, dtype, width)
        if moved <= _NEAR.get(dtype, 0.0):
            return kernels[device]
        reason = f"it is off by {moved:.2g}"
    except (RuntimeError, AttributeError) as error:
        reason = one_line(error)
    log.warning("ring attention goes by matrix products: torch's kernel for it cannot be used (%s)", reason)
    return Plain()


@torch.no_grad()
def difference(kernel: BlockAttention, device: str, dtype: torch.dtype, width: int) -> float:
    """How far the kernel's outputs, log-sums and gradients are from the plain way's, as a share of the largest."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        return torch.randn(1, heads, 40, width, generator=generator).to(device, dtype)

    hidden = 4  # queries that see nothing of the block; their output and log-sum count for nothing
    seen = torch.ones(1, 1, 40, 40, dtype=torch.bool, device=device).tril(-hidden)
    block = Block(random(4), random(2), random(2), seen, width**-0.5)
    plain = Plain()
    output, lse = plain.forward(block)
    total = lse.logaddexp(torch.zeros_like(lse))  # as if there were another block

    def made(attend: BlockAttention) -> list[Tensor]:
        forward = [x[:, :, hidden:] for x in attend.forward(block)]
        return [*forward, *attend.backward(block, gradient, output, total)]

    gradient = random(4)
    pairs = [(a.double(), b.double()) for a, b in zip(made(kernel), made(plain), strict=True)]
    return max(relative_difference(a, b) for a, b in pairs)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _by_key_head(repeated: Tensor, block: Block) -> Tensor:
    """Gradients [B, H, S, E] of repeated keys or values, added up to [B, K, S, E]."""
    return repeated.unflatten(1, (block.key.shape[1], -1)).sum(2)
