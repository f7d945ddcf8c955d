"""What cannot be split is refused with the equation, before any process exists."""

from __future__ import annotations

import pytest
from dayzero.config import Method
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.tensor_parallel import tensor_parallel_plan
from dayzero.errors import ConfigError

from tests.tiny import ARCHITECTURES


def empty(name: str, method: str = "full", **changed: int):
    source = ModelSource(directory=None, architecture={**ARCHITECTURES[name], **changed})
    return build_model(source, source.config(), Method(name=method), seed=0, meta=True)


def test_the_plan_names_every_split_linear_and_the_norms_between_them() -> None:
    plan = tensor_parallel_plan(empty("qwen3"), 2)
    of_layer = {n.removeprefix("model.layers.0."): s for n, s in plan.items() if n.startswith("model.layers.0.")}
    assert of_layer["self_attn.q_proj"] == "colwise"
    assert of_layer["mlp.down_proj"] == "rowwise"
    assert of_layer["self_attn.q_norm"] == "replicated_with_grad_allreduce"
    assert len(plan) == 4 * 9
    assert plan == tensor_parallel_plan(empty("qwen3", "lora"), 2)


@pytest.mark.parametrize(
    ("model", "changed", "tp", "message"),
    [
        ("llama", {}, 4, r"tp 4: the model has num_key_value_heads 2 / 4 = 0.5: use a divisor of 2"),
        ("llama", {}, 3, r"tp 3: the model has num_attention_heads 4 / 3 = 1.333: use a divisor of 4"),
        ("llama", {"intermediate_size": 65}, 2, r"gate_proj has outputs 65 / 2 = 32.5: use a divisor of 65"),
        ("mamba", {}, 2, r"tp 2: MambaForCausalLM ships no tensor-parallel plan"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_equation(model: str, changed: dict, tp: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tensor_parallel_plan(empty(model, **changed), tp)
