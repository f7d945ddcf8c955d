"""Ring attention and its blocks against plain attention over the whole row: values, gradients, and what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from dayzero.engine import attention_blocks
from dayzero.engine.attention_blocks import Block, EfficientOnCUDA, FlashOnCPU, Plain, block_attention, difference
from dayzero.engine.ring_attention import ring_attention
from torch import Tensor

SCALE = 0.3


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def tensors(width: int = 16, value_width: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Query with 4 heads, key and value with 2, over a row of two documents of 17 and 13 tokens; what is seen."""
    torch.manual_seed(0)
    sizes = ((4, width), (2, width), (2, value_width))
    parts = [torch.randn(2, heads, 30, w, dtype=dtype).requires_grad_() for heads, w in sizes]
    document = torch.arange(30) >= 17
    seen = torch.ones(30, 30, dtype=torch.bool).tril() & (document[:, None] == document[None, :])
    return (*parts, seen[None, None].expand(2, 1, 30, 30))


def plain_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * SCALE).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("widths", [(16, 16), (24, 16)])
def test_a_ring_is_plain_attention(group: Any, widths: tuple[int, int]) -> None:
    query, key, value, seen = tensors(*widths)
    got = ring_attention(query, key, value, SCALE, group, lambda rank: seen)
    want = plain_attention(query, key, value, seen)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    by_output = torch.randn_like(want)
    gradients = [torch.autograd.grad(out, (query, key, value), by_output) for out in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attend", [Plain(), FlashOnCPU()], ids=["plain", "flash"])
def test_blocks_put_together_are_plain_attention(attend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_blocks, "QUERIES", 7)
    query, key, value, seen = tensors()
    want = plain_attention(query, key, value, seen)
    by_output = torch.randn_like(want)
    wanted = torch.autograd.grad(want, (query, key, value), by_output)
    with torch.no_grad():
        places = [slice(0, 11), slice(11, 12), slice(12, 30)]  # of the first no query of the second document sees any
        blocks = [Block(query, key[:, :, p], value[:, :, p], seen[..., p], SCALE) for p in places]
        parts = [attend.forward(block) for block in blocks]
        sums = torch.stack([lse for _, lse in parts])
        total = sums.logsumexp(0)
        output = sum(part * share.unsqueeze(-1) for (part, _), share in zip(parts, (sums - total).exp(), strict=True))
        torch.testing.assert_close(output, want, rtol=1e-12, atol=1e-12)
        assert isinstance(output, Tensor)
        found = [attend.backward(block, by_output, output, total) for block in blocks]
    torch.testing.assert_close(sum(part[0] for part in found), wanted[0], rtol=1e-12, atol=1e-12)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([part[i] for part in found], dim=2), wanted[i], rtol=1e-12, atol=1e-12)


def test_no_scores_are_kept_for_the_backward_pass(group: Any) -> None:
    query, key, value = (torch.randn(1, 4, 1024, 16, requires_grad=True) for _ in range(3))
    seen = torch.ones(1, 1, 1024, 1024, dtype=torch.bool).tril()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ring_attention(query, key, value, SCALE, group, lambda rank: seen)
    # query, key, value, output and a number a query; the scores alone would be 64 times the query
    assert sum(kept) <= 5 * query.nbytes


def test_autocast_leaves_queries_in_float32(group: Any) -> None:
    query, key, value, seen = tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ring_attention(query, key, value.bfloat16(), SCALE, group, lambda rank: seen)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), plain_attention(query, key, value, seen), rtol=0, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_cpu_kernel_is_right_and_used(dtype: torch.dtype) -> None:
    assert isinstance(block_attention(torch.zeros(1, 1, 1, 24, dtype=dtype)), FlashOnCPU)


def test_a_kernel_that_is_wrong_or_missing_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = FlashOnCPU.backward

    def wrong(self: FlashOnCPU, *given: Any) -> Any:
        return tuple(1.01 * gradient for gradient in real(self, *given))

    def missing(self: FlashOnCPU, *given: Any) -> Any:
        raise RuntimeError("no kernel\nof that kind")

    for backward, reason in ((wrong, "it is off by 0.01"), (missing, "no kernel of that kind")):
        monkeypatch.setattr(FlashOnCPU, "backward", backward)
        attention_blocks._chosen.cache_clear()
        assert isinstance(block_attention(torch.zeros(1, 1, 1, 16)), Plain)
        assert reason in caplog.text
    attention_blocks._chosen.cache_clear()


def test_the_cuda_kernel_is_called_as_it_wants_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the kernel, which is right and holds its caller to what the real one needs (tests/gpu)."""
    forward, backward = FlashOnCPU().forward, FlashOnCPU().backward

    def checked(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float) -> Block:
        assert key.shape[1] == value.shape[1] == query.shape[1]
        assert bias.shape == (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        assert bias.stride(-2) % 16 == 0
        assert bias.dtype == query.dtype
        assert not dropout
        return Block(query, key, value, bias[:, :1] == 0, 40**-0.5)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sums: bool, dropout: float, causal: bool, *, scale: float):
        assert sums
        assert not causal
        assert scale == 40**-0.5
        output, lse = forward(checked(q, k, v, bias, dropout))
        return output, F.pad(lse, (0, 64 - 40), value=float("inf")), None, None

    def run_back(
        gradient: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        output: Tensor,
        lse: Tensor,
        *rest: Any,
        **_: Any,
    ) -> Any:
        dropout, wanted, causal = rest[2:]
        assert lse.shape[2] == 64
        assert output.transpose(1, 2).is_contiguous()  # of its strides the kernel for bfloat16 reads none
        assert wanted == [True, True, True, False]
        assert not causal
        return *backward(checked(q, k, v, bias, dropout), gradient, output, lse[:, :, :40].contiguous()), None

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", run)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention_backward", run_back)
    assert difference(EfficientOnCUDA(), "cpu", torch.float32, 40) < 1e-5
