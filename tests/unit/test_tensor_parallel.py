"""What cannot be split is refused with the equation, before any process exists."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dayzero.config import Method
from dayzero.engine.derived_plan import NoPlan, derive_plan
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.tensor_parallel import tensor_parallel_plan
from dayzero.errors import ConfigError
from transformers import PreTrainedModel

from tests.tiny import ARCHITECTURES


def empty(name: str, method: str = "full", **changed: int):
    source = ModelSource(directory=None, architecture={**ARCHITECTURES[name], **changed})
    return build_model(source, source.config(), Method(name=method), seed=0, meta=True)


def test_the_plan_names_every_split_linear_and_the_norms_between_them() -> None:
    plan = tensor_parallel_plan(empty("qwen3"), 2).styles
    of_layer = {n.removeprefix("model.layers.0."): s for n, s in plan.items() if n.startswith("model.layers.0.")}
    assert of_layer["self_attn.q_proj"] == "colwise"
    assert of_layer["mlp.down_proj"] == "rowwise"
    assert of_layer["self_attn.q_norm"] == "replicated_with_grad_allreduce"
    assert len(plan) == 4 * 9
    assert plan == tensor_parallel_plan(empty("qwen3", "lora"), 2).styles


@pytest.mark.parametrize(
    ("model", "changed", "tp", "message"),
    [
        ("llama", {}, 4, r"tp 4: the model has num_key_value_heads 2 / 4 = 0.5: use a divisor of 2"),
        ("llama", {}, 3, r"tp 3: the model has num_attention_heads 4 / 3 = 1.333: use a divisor of 2"),
        (
            "llama",
            {"num_attention_heads": 8, "num_key_value_heads": 1},
            2,
            r"num_key_value_heads 1 / 2 = 0.5: no tp divides",
        ),
        (
            "llama",
            {"intermediate_size": 65},
            2,
            r"gate_proj has outputs 65 / 2 = 32.5: no tp divides all that it must: use",
        ),
        (
            "mamba",
            {},
            2,
            r"MambaForCausalLM ships no .* and none can be derived: its config has no num_attention_heads",
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_the_equation(model: str, changed: dict, tp: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tensor_parallel_plan(empty(model, **changed), tp)


# num_hidden_layers, hidden_size and num_attention_heads go by these names in every config
SHAPE = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}


def bare(model_type: str, **fields: Any) -> PreTrainedModel:
    source = ModelSource(directory=None, architecture={"model_type": model_type, **SHAPE, **fields})
    return build_model(source, source.config(), Method(name="full"), seed=0, meta=True)


def layer_of(plan: dict[str, Any]) -> dict[str, Any]:
    """What a plan says of one layer, without the layer's own name."""
    assert len({name.count("*") for name in plan}) <= 1
    return {name.partition("*.")[2]: value for name, value in plan.items()}


SEPARATE = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise"}


@pytest.mark.parametrize(
    ("model_type", "fields", "styles", "divided"),
    [
        (
            "opt",  # the MLP lies in the layer itself, everything has a bias
            {"ffn_dim": 64, "word_embed_proj_dim": 32},
            {**{f"self_attn.{k}": v for k, v in SEPARATE.items()}, "self_attn.out_proj": "rowwise", "fc1": "colwise",
             "fc2": "rowwise"},
            {"self_attn": ("num_heads",)},
        ),
        (
            "stablelm",  # grouped queries, a gated MLP
            {"intermediate_size": 64, "num_key_value_heads": 2},
            {**{f"self_attn.{k}": v for k, v in SEPARATE.items()}, "self_attn.o_proj": "rowwise",
             "mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"},
            {"self_attn": ("num_heads", "num_key_value_heads")},
        ),
        (
            "gptj",  # attention and MLP side by side
            {"rotary_dim": 4},
            {**{f"attn.{k}": v for k, v in SEPARATE.items()}, "attn.out_proj": "rowwise", "mlp.fc_in": "colwise",
             "mlp.fc_out": "rowwise"},
            {"attn": ("num_attention_heads",)},
        ),
        (
            "persimmon",  # one projection, head by head, and norms of single heads
            {"intermediate_size": 64},
            {"self_attn.query_key_value": "colwise", "self_attn.dense": "rowwise", "mlp.dense_h_to_4h": "colwise",
             "mlp.dense_4h_to_h": "rowwise", "self_attn.q_layernorm": "replicated_with_grad_allreduce",
             "self_attn.k_layernorm": "replicated_with_grad_allreduce"},
            {"self_attn": ("num_heads",)},
        ),
    ],
)  # fmt: skip
def test_a_plan_is_derived_by_structure(
    model_type: str, fields: dict[str, Any], styles: dict[str, str], divided: dict[str, Any]
) -> None:
    model = bare(model_type, **fields)
    torch.manual_seed(3)
    before = torch.rand(1)
    torch.manual_seed(3)
    plan = derive_plan(model, 2)
    assert torch.equal(torch.rand(1), before)  # training's random numbers stay the same
    assert layer_of(plan.styles) == styles
    assert layer_of(plan.divided) == divided
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model_type", "fields", "says"),
    [
        ("gpt2", {}, r"h\.0\.attn\.c_attn\.weight \(Conv1D\) is none of the linear layers that can be split"),
        ("mpt", {}, r"split over 2 ranks it cannot compute \(.*"),  # query, key, value are whole thirds of one matrix
        ("bloom", {}, r"split over 2 ranks it cannot compute \(.*"),  # position biases are made for all heads
        ("codegen", {"rotary_dim": 4}, r"split over 2 ranks .*"),  # one projection, cut into blocks of heads
        ("diffllama", {"intermediate_size": 64}, r"split over 2 ranks .*"),
        (
            "mixtral",
            {"intermediate_size": 64, "num_key_value_heads": 2},
            r"gate\.weight \(.*Router\) is none of the linear layers .*",
        ),
    ],
)
def test_what_cannot_be_split_rightly_is_refused(model_type: str, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(NoPlan, match=says):
        derive_plan(bare(model_type, **fields), 2)


def test_sequence_parallelism_needs_the_model_s_own_plan() -> None:
    with pytest.raises(
        ConfigError, match=r"no tensor-parallel plan that can be used, which parallelism.sequence_parallel"
    ):
        tensor_parallel_plan(bare("opt", ffn_dim=64, word_embed_proj_dim=32), 2, sequence_parallel=True)


def test_adapters_do_not_change_a_derived_plan() -> None:
    fields = {"model_type": "opt", **SHAPE, "ffn_dim": 64, "word_embed_proj_dim": 32}
    source = ModelSource(directory=None, architecture=fields)
    lora = build_model(source, source.config(), Method(name="lora"), seed=0, meta=True)
    plain = bare("opt", ffn_dim=64, word_embed_proj_dim=32)
    assert tensor_parallel_plan(lora, 2).styles == tensor_parallel_plan(plain, 2).styles


def test_a_row_split_layer_into_whose_output_the_model_writes_is_found() -> None:
    """Llama 4 adds what its routed experts give to the shared expert's output, in place."""
    experts = {"num_local_experts": 4, "intermediate_size": 64, "intermediate_size_mlp": 64}
    plan = tensor_parallel_plan(bare("llama4_text", head_dim=8, num_key_value_heads=2, **experts), 2).styles
    rows = {name.partition("layers.0.")[2]: style for name, style in plan.items() if style.startswith("rowwise")}
    assert rows["feed_forward.shared_expert.down_proj"] == "rowwise_written"
    assert rows["self_attn.o_proj"] == "rowwise"
