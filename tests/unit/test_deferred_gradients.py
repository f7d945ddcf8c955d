"""Gradients of weights that wait are those that do not, with and without activation checkpointing."""

from __future__ import annotations

import pytest
import torch
from dayzero.engine.deferred_gradients import DeferredGradients
from torch import nn
from torch.utils.checkpoint import checkpoint


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.GELU(), nn.Linear(8, 3))


@pytest.mark.parametrize("recompute", [False, True])
def test_deferred_gradients_are_the_same(recompute: bool) -> None:
    plain, waiting = network(), network()
    plain[2].weight.requires_grad_(False)
    waiting[2].weight.requires_grad_(False)
    deferred = DeferredGradients(waiting)
    work = []
    for seed in range(3):  # the second micro-batch's backward pass comes before the first one's weights
        x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed))
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        plain(inputs[0]).square().sum().backward()
        output = checkpoint(waiting, inputs[1], use_reentrant=False) if recompute else waiting(inputs[1])
        output.square().sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        assert waiting[1].weight.grad is not None  # only linear weights wait
        work.append(deferred.take())
    assert waiting[0].weight.grad is None
    for do in work:
        do()
    for (name, expected), found in zip(plain.named_parameters(), waiting.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad)


def test_without_gradients_nothing_waits() -> None:
    module = network()
    deferred = DeferredGradients(module)
    with torch.no_grad():
        module(torch.ones(1, 1, 4))
    deferred.take()()
    assert module[0].weight.grad is None
