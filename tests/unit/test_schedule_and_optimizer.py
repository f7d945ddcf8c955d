"""Learning-rate curves at their corners, decay groups, and clipping by the true global norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dayzero.config import LrScheduler, Method, Muon, Optimizer
from dayzero.engine.lr_scheduler import lr_factor
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.optimizer import build_optimizer, clip_grad_norm, decay_groups, hidden_matrices, set_lr
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.errors import ConfigError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)
from transformers.pytorch_utils import Conv1D

from tests.tiny import ARCHITECTURES


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("constant", {1: 0.25, 4: 1.0, 5: 1.0, 20: 1.0}),
        ("linear", {1: 0.25, 4: 1.0, 5: 1.0, 13: 0.55, 20: 0.15625, 21: 0.1}),
        ("cosine", {2: 0.5, 4: 1.0, 5: 1.0, 13: 0.55, 21: 0.1}),
        ("wsd", {2: 0.5, 4: 1.0, 14: 1.0, 16: 1.0, 17: 0.82, 20: 0.28, 21: 0.1}),
    ],
)
def test_learning_rate_curves(name: str, points: dict[int, float]) -> None:
    config = LrScheduler(name=name, warmup_steps=4, min_lr_ratio=0.1, decay_steps=5 if name == "wsd" else None)
    for step, factor in points.items():
        assert lr_factor(step, 20, config) == pytest.approx(factor), step


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
def test_every_step_trains(name: Any) -> None:
    config = LrScheduler(name=name)
    assert lr_factor(1, 1, config) == 1.0
    for steps in (2, 3, 30):
        factors = [lr_factor(step, steps, config) for step in range(1, steps + 1)]
        assert factors[0] == 1.0
        assert min(factors) > 0


@pytest.mark.parametrize("warmup", [0, 4])
def test_behind_the_warm_up_the_curves_are_those_of_transformers(warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    for name, schedule in (
        ("linear", get_linear_schedule_with_warmup(optimizer, warmup, 20)),
        ("cosine", get_cosine_schedule_with_warmup(optimizer, warmup, 20)),
        ("wsd", get_wsd_schedule(optimizer, warmup, 5, num_training_steps=20, decay_type="linear")),
    ):
        config = LrScheduler(name=name, warmup_steps=warmup, decay_steps=5 if name == "wsd" else None)  # type: ignore[arg-type]
        (factor,) = schedule.lr_lambdas
        for step in range(warmup + 1, 21):
            assert lr_factor(step, 20, config) == pytest.approx(factor(step - 1)), (name, step)


def test_matrices_decay_and_biases_norms_and_embeddings_do_not() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    model["linear"].bias.requires_grad_(False)
    decay, no_decay = decay_groups(model)
    assert [p is model["linear"].weight for p in decay] == [True]
    assert {id(p) for p in no_decay} == {id(model["embed"].weight), *(id(p) for p in model["norm"].parameters())}


SMALL = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2}
MIXTURE = {**ARCHITECTURES["llama"], "num_experts": 4, "num_experts_per_tok": 2}


def empty(**fields: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))


@pytest.mark.parametrize(
    ("fields", "vectors", "matrices"),
    [
        (
            ARCHITECTURES["gpt_oss"],
            {"gate_up_proj_bias", "down_proj_bias", "sinks"},
            {"gate_up_proj", "down_proj", "router.weight", "q_proj.weight"},
        ),
        (
            {**ARCHITECTURES["llama"], "model_type": "cohere", "use_qk_norm": True},
            {"q_norm.weight", "k_norm.weight"},
            {"k_proj.weight"},
        ),
        (
            {**SMALL, "model_type": "rwkv", "context_length": 64},
            {"attention.time_mix_key", "attention.time_decay", "ln1.weight"},
            {"attention.key.weight"},
        ),
        ({**SMALL, "model_type": "gpt2", "n_head": 4}, {"c_fc.bias", "wpe.weight"}, {"c_fc.weight", "c_proj.weight"}),
    ],
    ids=["gpt_oss", "cohere", "rwkv", "gpt2"],
)
def test_vectors_stacked_for_experts_or_heads_do_not_decay(
    fields: dict[str, Any], vectors: set[str], matrices: set[str]
) -> None:
    model = empty(**fields)
    names = {id(p): name for name, p in model.named_parameters()}
    decay, no_decay = ([names[id(p)] for p in group] for group in decay_groups(model))
    for expected, found, other in ((vectors, no_decay, decay), (matrices, decay, no_decay)):
        for end in expected:
            assert any(name.endswith(f".{end}") for name in found), end
            assert not any(name.endswith(f".{end}") for name in other), end


def test_a_linear_layer_with_one_output_decays() -> None:
    assert decay_groups(nn.Linear(4, 1, bias=False))[0]


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


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_every_optimizers_moments_have_the_dtype_asked_for(name: Any, moments: Any) -> None:
    model = empty(**ARCHITECTURES["mixtral"]).to_empty(device="cpu").bfloat16()
    optimizer = build_optimizer(model, Optimizer(name=name, lr=1e-3, state_dtype=moments))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert len(optimizer.state) == len(list(model.parameters()))
    for state in optimizer.state.values():
        assert {v.dtype for k, v in state.items() if k != "step"} == {getattr(torch, moments)}


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


JAMBA = {"mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
         "expert_layer_offset": 1, "use_mamba_kernels": False}  # fmt: skip
SHARED = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 4}


@pytest.mark.parametrize(
    ("fields", "routers", "hidden"),
    [
        ({**MIXTURE, **JAMBA, "model_type": "jamba"}, {"router.weight"}, {"in_proj.weight", "experts.down_proj"}),
        # the shared expert happens to have as many outputs as there are experts
        (
            {**MIXTURE, **SHARED, "model_type": "qwen2_moe"},
            {"shared_expert_gate.weight", "mlp.gate.weight"},
            {"shared_expert.gate_proj.weight", "shared_expert.up_proj.weight"},
        ),
        ({**MIXTURE, "model_type": "phimoe", "num_local_experts": 4}, {"router.weight"}, {"q_proj.weight"}),
    ],
    ids=["jamba", "qwen2_moe", "phimoe"],
)
def test_routers_are_not_muons(fields: dict[str, Any], routers: set[str], hidden: set[str]) -> None:
    model = empty(**fields)
    names = {id(p): name for name, p in model.named_parameters()}
    muons = {names[key] for key in hidden_matrices(model)}
    for end in routers:
        assert any(name.endswith(end) for name in names.values()), end
        assert not any(name.endswith(end) for name in muons), end
    for end in hidden:
        assert any(name.endswith(end) for name in muons), end


class Experts(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = shape[0], False
        self.weight = nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss"])
def test_muons_original_step_knows_inputs_from_outputs(name: str) -> None:
    """Of weights that are stored transposed, against the same matrices the usual way round."""
    torch.manual_seed(0)
    config = Optimizer(name="muon", lr=1e-2, muon=Muon(adjust_lr="original"))
    stored, usual = (Conv1D(8, 2), nn.Linear(2, 8)) if name == "gpt2" else (Experts(3, 2, 8), Experts(3, 8, 2))
    with torch.no_grad():
        usual.weight.copy_(stored.weight.mT)
    stored.weight.grad = torch.randn_like(stored.weight)
    usual.weight.grad = stored.weight.grad.mT.contiguous()
    if name != "gpt2":
        stored.is_transposed = True
    for model in (stored, usual):
        build_optimizer(model, config).step()
    torch.testing.assert_close(stored.weight.detach(), usual.weight.detach().mT)


def test_muons_original_step_is_refused_where_inputs_are_not_known() -> None:
    usual = Experts(3, 8, 2)
    del usual.is_transposed
    with pytest.raises(ConfigError, match=r"adjust_lr original: .* experts do not say .* use match_rms_adamw"):
        build_optimizer(usual, Optimizer(name="muon", lr=1e-2, muon=Muon(adjust_lr="original")))


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_steps_of_bfloat16_weights_are_rounded_once(name: Any) -> None:
    """Decay and update together, against the same step of float32 weights."""
    torch.manual_seed(0)
    values, gradient = torch.randn(64, 48).bfloat16(), torch.randn(64, 48).bfloat16()
    after = []
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Linear(48, 64, bias=False, dtype=dtype)
        model.weight.data.copy_(values)
        model.weight.grad = gradient.to(dtype)
        build_optimizer(model, Optimizer(name=name, lr=1e-2, weight_decay=0.1)).step()
        after.append(model.weight.detach())
    assert torch.equal(after[0].bfloat16(), after[1])


def test_adafactor_learns_bfloat16_weights_from_small_gradients() -> None:
    """The floor of squared gradients is that of float32, in which they are kept."""
    torch.manual_seed(0)
    inputs, wanted = torch.randn(256, 32), torch.randn(32, 32) * 0.3
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Linear(32, 32, bias=False, dtype=dtype)
        optimizer = build_optimizer(model, Optimizer(name="adafactor", lr=1e-2, weight_decay=0.0))
        for _ in range(300):
            loss = (inputs @ (model.weight.float().t() - wanted)).square().mean()
            (loss * 1e-2).backward()
            optimizer.step()
            optimizer.zero_grad()
        errors[dtype] = loss.item()
    assert errors[torch.float32] < 1e-4
    assert errors[torch.bfloat16] < 1e-2


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
