"""Learning-rate curves at their corners, decay groups, and clipping by the true global norm."""

from __future__ import annotations

import pytest
import torch
from dayzero.config import LrScheduler, Optimizer
from dayzero.engine.lr_scheduler import lr_factor
from dayzero.engine.optimizer import build_optimizer, clip_grad_norm, decay_groups
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.errors import ConfigError
from torch import nn


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("constant", {1: 0.25, 4: 1.0, 5: 1.0, 20: 1.0}),
        ("linear", {1: 0.25, 4: 1.0, 12: 0.55, 20: 0.1}),
        ("cosine", {2: 0.5, 4: 1.0, 12: 0.55, 20: 0.1}),
        ("wsd", {2: 0.5, 4: 1.0, 14: 1.0, 15: 1.0, 16: 0.82, 20: 0.1}),
    ],
)
def test_learning_rate_curves(name: str, points: dict[int, float]) -> None:
    config = LrScheduler(name=name, warmup_steps=4, min_lr_ratio=0.1, decay_steps=5 if name == "wsd" else None)
    for step, factor in points.items():
        assert lr_factor(step, 20, config) == pytest.approx(factor), step


def test_without_warmup_the_first_step_is_near_the_peak() -> None:
    assert lr_factor(1, 100, LrScheduler(name="cosine")) == pytest.approx(1.0, abs=1e-3)


def test_matrices_decay_and_biases_norms_and_embeddings_do_not() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    model["linear"].bias.requires_grad_(False)
    decay, no_decay = decay_groups(model)
    assert [p is model["linear"].weight for p in decay] == [True]
    assert {id(p) for p in no_decay} == {id(model["embed"].weight), *(id(p) for p in model["norm"].parameters())}


def test_adamw_decays_apart_from_the_gradient() -> None:
    model = nn.Linear(3, 3, bias=False)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, Optimizer(lr=0.1, weight_decay=0.5))
    model.weight.grad = torch.zeros(3, 3)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before * (1 - 0.1 * 0.5))


def test_clipping_scales_all_gradients_by_one_factor() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_grad_norm(parameters, 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0]), rtol=1e-5, atol=0)
    assert clip_grad_norm(parameters, 0.0) == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.8]), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"strategy": "fsdp2", "dp_shard": 3}, r"dp_shard 3 x cp 1 x tp 1 = 3, but the world size is 2"),
        ({"strategy": "none", "dp_shard": 2}, r"strategy: none is one process, but .* = 2"),
        (
            {"strategy": "ddp", "dp_shard": 2},
            r"ddp keeps whole copies, but .* dp_shard 2 .*use dp_replicate 2",
        ),
        ({"strategy": "ddp", "dp_replicate": 1, "tp": 2}, r"ddp splits only rows, but .* tp 2 = 2"),
        ({"strategy": "fsdp2", "dp_shard": 2, "sequence_parallel": True}, r"sequence_parallel: is on, but tp is 1"),
        ({"strategy": "zero"}, r"strategy: 'zero' is unknown"),
    ],
)
def test_impossible_products_are_refused_with_the_equation(sizes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelDims(world_size=2, **sizes)


def test_global_batch_that_does_not_divide_is_refused_with_the_equation() -> None:
    dims = ParallelDims(strategy="fsdp2", world_size=2, dp_shard=2)
    assert dims.grad_accum_steps(16, 2) == 4
    with pytest.raises(ConfigError, match=r"12 % \(local_batch_size 4 \* dp 2\) = 4, must be 0: use 8 or 16"):
        dims.grad_accum_steps(12, 4)
