"""Learning-rate curves at their corners, decay groups, and clipping by the true global norm."""

from __future__ import annotations

import pytest
import torch
from dayzero.config import LrScheduler, Method, Muon, Optimizer
from dayzero.engine.lr_scheduler import lr_factor
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.optimizer import build_optimizer, clip_grad_norm, decay_groups, set_lr
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.errors import ConfigError
from torch import nn

from tests.tiny import ARCHITECTURES


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


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_moments_have_the_dtype_asked_for_and_steps_are_in_float32(weights: torch.dtype, moments: str) -> None:
    """Against AdamW written out in float32, weights and moments rounded when they are stored."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False, dtype=weights)
    config = Optimizer(lr=0.1, weight_decay=0.5, state_dtype=moments)
    optimizer = build_optimizer(model, config)
    dtype = getattr(torch, moments)
    w, m, v = model.weight.detach().clone(), torch.zeros(3, 4, dtype=dtype), torch.zeros(3, 4, dtype=dtype)
    for step in range(1, 21):
        model.weight.grad = torch.randn(3, 4, dtype=weights)
        g = model.weight.grad.float()
        first, second = 0.9 * m.float() + 0.1 * g, 0.95 * v.float() + 0.05 * g * g
        m, v = first.to(dtype), second.to(dtype)
        update = first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        w = (w.float() * (1 - 0.1 * 0.5) - 0.1 * update).to(weights)
        optimizer.step()
    (state,) = optimizer.state.values()
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
    torch.testing.assert_close(model.weight.detach(), w, rtol=1e-5 if weights == torch.float32 else 1e-2, atol=1e-6)


def test_muon_takes_the_matrices_of_the_layers_only() -> None:
    fields = {**ARCHITECTURES["mixtral"], "tie_word_embeddings": False}
    source = ModelSource(directory=None, architecture=fields, random_weights=True)
    model = build_model(source, source.config(), Method(name="pretrain"), 0, meta=True)
    optimizer = build_optimizer(model, Optimizer(name="muon", lr=1e-3, muon=Muon(lr=1e-2)))
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {
        names[id(p)].rpartition("layers.0.")[2] for p in optimizer.param_groups[0]["params"] if ".0." in names[id(p)]
    }
    linears = {f"self_attn.{n}_proj.weight" for n in "qkvo"}
    assert by_muon == linears | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    rest = {names[id(p)] for group in optimizer.param_groups[1:] for p in group["params"]}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight"} <= rest
    assert len(rest) + len(optimizer.param_groups[0]["params"]) == len(names)
    set_lr(optimizer, 5e-4)  # half way up
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [5e-3] + [5e-4] * (len(optimizer.param_groups) - 1)
    )


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
