"""Layers that mix tokens in a way of their own are found before their tokens are split over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dayzero.config import Train
from dayzero.engine.distillation import build_teacher, teacher_weights
from dayzero.engine.model import ModelSource
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.tensor_parallel import tensor_parallel_plan
from dayzero.engine.token_split import require_context_parallel
from dayzero.errors import ConfigError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "mixtral": {"num_local_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"head_dim": 8, "attention_chunk_size": 8, "num_local_experts": 2, "moe_layers": [],
                    "pad_token_id": 0},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
        "num_local_experts": 0, "shared_intermediate_size": 64,
    },
    "minimax": {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2},
    "gemma2": {"head_dim": 8},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def model_of(kind: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **MODELS[kind]}))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral"])
def test_attention_alone_may_see_tokens_in_any_order(kind: str) -> None:
    require_context_parallel(model_of(kind), 2, "allgather")


@pytest.mark.parametrize("kind", ["lfm2", "llama4_text", "granitemoehybrid", "minimax"])
def test_layers_that_mix_tokens_otherwise_are_refused(kind: str) -> None:
    with pytest.raises(
        ConfigError, match=r"parallelism.cp 2: .* mixes tokens in other ways than the attention that cp"
    ):
        require_context_parallel(model_of(kind), 2, "allgather")


def test_a_teacher_is_asked_too() -> None:
    architecture = {"model_type": "lfm2", **SIZES, **MODELS["lfm2"]}
    weights = teacher_weights(ModelSource(directory=None, architecture=architecture))
    dims = ParallelDims(strategy="fsdp2", world_size=2, cp=2)
    with pytest.raises(ConfigError, match="Lfm2ForCausalLM mixes tokens in other ways"):
        build_teacher(weights, Train(max_steps=1), dims, None, torch.device("cpu"))


@pytest.mark.parametrize(("kind", "option"), [("gemma2", "softcap"), ("gpt_oss", "s_aux")])
def test_what_is_added_to_the_scores_is_refused_before_a_weight_is_read(kind: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"uses {option}, which that of cp lacks"):
        require_context_parallel(model_of(kind), 2, "allgather")


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral"])
def test_a_plan_that_leaves_only_single_tokens_outside(kind: str) -> None:
    assert tensor_parallel_plan(model_of(kind), 2, sequence_parallel=True).styles


def test_a_layer_outside_of_the_split_that_mixes_tokens() -> None:
    assert tensor_parallel_plan(model_of("minimax"), 2).styles
    with pytest.raises(ConfigError, match=r"sequence_parallel: \S+ \(MiniMax\w+\) mixes tokens outside of what tp 2"):
        tensor_parallel_plan(model_of("minimax"), 2, sequence_parallel=True)


def test_a_plan_that_splits_nothing_is_none() -> None:
    """OLMoE's own plan splits by styles that adapters do not go with; it used to be taken, and split nothing."""
    with pytest.raises(ConfigError, match="ships no tensor-parallel plan that can be used and none can be derived"):
        tensor_parallel_plan(model_of("olmoe"), 2)
