"""What is asked of a tiny copy of a model because the model itself, or a short row, would not tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dayzero.config import Method, Train
from dayzero.engine.kernels import use_attention
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.packing import architecture_leak, packing_leak
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.tensor_parallel import tensor_parallel_plan
from dayzero.engine.tiny_copy import VOCAB_SIZE, mixes_dtypes, tiny_configs, tiny_copy
from dayzero.errors import ConfigError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.tiny import ARCHITECTURES


def default(model_type: str) -> PreTrainedModel:
    """The architecture at its full default size, without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](), dtype=torch.float32)


def tiny(model_type: str) -> PreTrainedModel:
    small = tiny_copy(default(model_type))
    assert small is not None
    return small


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "jamba", "qwen3_next", "deepseek_v4", "mpt", "xlstm"])
def test_the_copy_keeps_the_architecture_and_loses_the_size(model_type: str) -> None:
    full, small = default(model_type), tiny(model_type)
    assert type(small) is type(full)
    assert sum(p.numel() for p in small.parameters()) < 1_000_000
    kinds = {type(m).__name__ for m in full.modules()}
    assert {type(m).__name__ for m in small.modules()} >= kinds - {"ModuleList"}
    again = tiny_copy(default(model_type))
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))


def test_a_leak_that_only_long_rows_show_is_found_on_the_copy() -> None:
    """Sparse attention that chooses 2,048 tokens chooses all of a short row's."""
    config = next(tiny_configs(CONFIG_MAPPING["glm_moe_dsa"]()))
    config.index_topk = 2048
    config.num_key_value_heads = config.num_attention_heads
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    assert packing_leak(logits, VOCAB_SIZE, "fp32") is None
    leak = architecture_leak(model, "sdpa")
    assert leak is not None
    assert leak > 1e-3


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss", "mamba"])
def test_the_copy_and_the_model_agree_on_what_leaks(name: str) -> None:
    source = ModelSource(directory=None, architecture=ARCHITECTURES[name])
    model = build_model(source, source.config(), Method(name="full"), seed=0, meta=True)
    assert (architecture_leak(model, "sdpa") is not None) == (name in ("mamba", "gpt_oss"))


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("gemma3n_text", r"plan that Gemma3nForCausalLM ships is wrong: .*logits would be off by 0"),
        ("granite_swa", r"plan that GraniteSWAForCausalLM ships is wrong: .*it cannot compute"),
        ("deepseek_v2", r"plan that DeepseekV2ForCausalLM ships is wrong: .*the gradient of .* would be wrong"),
    ],
)
def test_a_shipped_plan_that_computes_something_else_is_refused(model_type: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tensor_parallel_plan(tiny(model_type), 2)


def test_a_shipped_plan_is_given_the_sums_of_gradients_that_it_lacks() -> None:
    """Activations with parameters of their own, between split matrices."""
    model: Any = tiny("apertus")
    styles = tensor_parallel_plan(model, 2).styles
    assert styles["model.layers.0.mlp.act_fn"] == "replicated_with_grad_allreduce"
    assert "model.layers.*.mlp.act_fn" not in model.tp_plan


@pytest.mark.parametrize(("model_type", "mixes"), [("llama", False), ("openai-gpt", True), ("minimax", True)])
def test_buffers_that_bfloat16_parameters_cannot_meet_are_found(model_type: str, mixes: bool) -> None:
    assert mixes_dtypes(default(model_type)) == mixes
    again = tiny_copy(default(model_type))
    assert again is not None
    assert {p.dtype for p in again.parameters()} == {torch.float32}  # a question leaves nothing behind


@pytest.mark.parametrize(("model_type", "documents"), [("llama", True), ("glm_moe_dsa", False)])
def test_a_model_that_reads_its_mask_keeps_its_own_attention(model_type: str, documents: bool) -> None:
    train = Train(max_steps=1)
    chosen = use_attention(tiny(model_type), train, ParallelDims(world_size=1, strategy="none"))
    assert chosen == ("documents" if documents and not torch.cuda.is_available() else "sdpa")
