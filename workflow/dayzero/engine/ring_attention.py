"""Ring attention (Liu et al. 2023, https://arxiv.org/abs/2310.01889): keys and values travel round the ranks while each
adds up its softmax. A rank holds its own keys and values and one other rank's, and the backward pass goes round again
rather than keep any scores.

Shapes: B rows, H query heads, K key and value heads, L tokens of this rank, E head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dayzero.engine.attention_blocks import Block, block_attention


@torch.compiler.disable
def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, group: dist.ProcessGroup, seen: Callable[[int], Tensor]
) -> Tensor:
    """query [B, H, L, E], key and value [B, K, L, E] -> [B, H, L, E].

    `seen`: which keys [B, 1, L, L] of another rank of the group, by its number, this rank's queries may see. Each
    query sees a key of its own rank.
    """
    width = value.shape[-1]
    widest = max(width, query.shape[-1])  # some models' values are narrower than their keys
    query, key, value = (F.pad(x.to(value.dtype), (0, widest - x.shape[-1])) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):  # which may have left rotated queries and keys in float32
        output: Tensor = _Ring.apply(query, key, value, scale, group, seen)
    return output[..., :width]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        group: dist.ProcessGroup,
        seen: Callable[[int], Tensor],
    ) -> Tensor:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        attend = block_attention(query)
        pair = torch.stack([key, value])
        for turn in range(size):
            part, part_lse = attend.forward(Block(query, pair[0], pair[1], seen((rank - turn) % size), scale))
            if turn == 0:
                output, lse = part.to(part_lse.dtype), part_lse
            else:
                total = torch.logaddexp(lse, part_lse)
                output = output * (lse - total).exp().unsqueeze(-1) + part * (part_lse - total).exp().unsqueeze(-1)
                lse = total
            if turn < size - 1:
                (pair,) = _passed_on(group, pair)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.scale, ctx.group, ctx.seen, ctx.attend = scale, group, seen, attend
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, output, lse = ctx.saved_tensors
        size, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        gradient = gradient.contiguous()
        pair = torch.stack([key, value])
        of_query = torch.zeros_like(query, dtype=lse.dtype)
        of_pair = torch.zeros_like(pair, dtype=lse.dtype)  # travels with its pair, and comes home after the last turn
        for turn in range(size):
            block = Block(query, pair[0], pair[1], ctx.seen((rank - turn) % size), ctx.scale)
            by_query, *by_pair = ctx.attend.backward(block, gradient, output, lse)
            of_query += by_query
            of_pair += torch.stack(by_pair)
            if turn < size - 1:
                pair, of_pair = _passed_on(ctx.group, pair, of_pair)
            elif size > 1:
                (of_pair,) = _passed_on(ctx.group, of_pair)
        of_key, of_value = of_pair.to(key.dtype)
        return of_query.to(query.dtype), of_key, of_value, None, None, None


def _passed_on(group: dist.ProcessGroup, *tensors: Tensor) -> list[Tensor]:
    """Give the tensors to the next rank of the ring and take the previous one's."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    to, source = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    received = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
    transfers = []
    for tensor, place in zip(tensors, received, strict=True):
        transfers.append(dist.P2POp(dist.isend, tensor.contiguous(), to, group))
        transfers.append(dist.P2POp(dist.irecv, place, source, group))
    for transfer in dist.batch_isend_irecv(transfers):
        transfer.wait()
    return received
