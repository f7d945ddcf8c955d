"""Experts are found by structure and shared out evenly, or refused in a line; exchanging tokens changes nothing."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from dayzero.config import Method
from dayzero.engine.expert_parallel import (
    apply_expert_parallel,
    check_expert_parallel,
    expert_placement,
    layer_placement,
)
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.parallel_dims import ParallelDims, SizeError
from dayzero.errors import ConfigError
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from tests.tiny import ARCHITECTURES

_TINY = {"vocab_size": 128, "hidden_size": 32, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_experts_per_tok": 2}  # fmt: skip
_TWO = {"num_hidden_layers": 2}
# biases and matrices the other way round (gpt_oss), experts without a gate (nemotron_h), shared experts (qwen2_moe),
# a router that picks by other numbers than it weights with (glm4_moe)
SHAPES = {
    **{name: ARCHITECTURES[name] for name in ("mixtral", "qwen3_moe")},
    "gpt_oss": {"model_type": "gpt_oss", **_TINY, **_TWO, "intermediate_size": 24, "head_dim": 8,
                "num_local_experts": 4},
    "qwen2_moe": {"model_type": "qwen2_moe", **_TINY, **_TWO, "moe_intermediate_size": 24, "num_experts": 4},
    "glm4_moe": {"model_type": "glm4_moe", **_TINY, **_TWO, "moe_intermediate_size": 24, "n_routed_experts": 4,
                 "first_k_dense_replace": 1, "intermediate_size": 48, "n_group": 1, "topk_group": 1},
    "nemotron_h": {"model_type": "nemotron_h", **_TINY, "layers_block_type": ["attention", "moe"], "head_dim": 8,
                   "n_routed_experts": 4, "n_groups": 1, "moe_intermediate_size": 24,
                   "moe_shared_expert_intermediate_size": 24},
}  # fmt: skip


def model_of(name: str, method: str = "full", *, meta: bool = True) -> nn.Module:
    source = ModelSource(directory=None, architecture=SHAPES.get(name) or ARCHITECTURES[name], random_weights=True)
    return build_model(source, source.config(), Method(name=method), seed=0, meta=meta)


@pytest.mark.parametrize("name", SHAPES)
def test_every_group_of_experts_is_found(name: str) -> None:
    model = model_of(name)
    found = check_expert_parallel(model, 2)
    inside = {id(p) for module in found.values() for p in module.parameters()}
    assert len(inside) >= 2
    assert {id(p) for p in model.parameters() if p.ndim == 3} <= inside


@pytest.mark.parametrize(
    ("model", "ep", "message"),
    [
        ("llama", 2, r"ep 2: LlamaForCausalLM has no grouped experts"),
        ("mixtral", 3, r"ep 3: model.layers.0.mlp.experts has experts 4 / 3 = 1.333: use a divisor of 4"),
        ("qwen3_moe", 4, r"ep 4: model.layers.0.mlp.experts has experts 6 / 4 = 1.5: use a divisor of 6"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_with_the_equation(model: str, ep: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_expert_parallel(model_of(model), ep)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dp_shard": 6, "ep": 4, "world_size": 6}, r"ep: takes its ranks from dp_shard 6, but 6 / ep 4 = 1.5"),
        ({"dp_shard": 1, "ep": 2, "world_size": 1}, r"dp_shard 1, but 1 / ep 2 = 0.5: set dp_shard to a multiple of 2"),
        ({"dp_shard": 3, "cp": 2, "ep": 4, "world_size": 6}, r"dp_shard 3 x cp 2 = 6, but 6 / ep 4 = 1.5"),
        ({"dp_replicate": 2, "ep": 2, "world_size": 2, "strategy": "ddp"}, r"ep: 2 needs strategy fsdp2, not ddp"),
        ({"dp_shard": 2, "pp": 2, "ep": 2, "world_size": 4}, r"ep: 2 does not go with pp 2: set one of them to 1"),
        ({"dp_shard": 2, "tp": 2, "ep": 2, "world_size": 4}, r"ep: 2 with tp 2: .* set sequence_parallel true"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_equation(sizes: dict, message: str) -> None:
    with pytest.raises(SizeError, match=message):
        ParallelDims(**{"strategy": "fsdp2", **sizes})


def test_experts_are_sharded_along_a_dim_that_divides() -> None:
    experts = nn.Parameter(torch.empty(6, 10, 7))
    assert expert_placement(3)(experts) == Shard(0)
    assert expert_placement(5)(experts) == Shard(1)
    assert expert_placement(7)(experts) == Shard(2)
    with pytest.raises(ConfigError, match=r"no dim of an expert weight \(6, 10, 7\) divides by .* = 4"):
        expert_placement(4)(experts)


def test_fewer_experts_than_ranks_leave_no_rank_empty() -> None:
    experts, matrix = nn.Parameter(torch.empty(4, 16, 7)), nn.Parameter(torch.empty(4, 16))
    assert layer_placement(4)(experts) is None
    assert layer_placement(8)(experts) == Shard(1)
    assert layer_placement(5)(experts) is None  # no dim divides: as FSDP2 does it
    assert layer_placement(8)(matrix) is None


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_exchange_of_tokens_changes_no_result(name: str, method: str, group) -> None:
    plain, shared = (model_of(name, method, meta=False) for _ in range(2))
    with torch.no_grad():
        for model in (plain, shared):
            torch.manual_seed(1)
            for n, p in model.named_parameters():
                if "lora_B" in n:
                    p.normal_(std=0.1)
    apply_expert_parallel(shared, init_device_mesh("cpu", (1,), mesh_dim_names=("ep",)))
    input_ids = torch.arange(24).view(2, 12)
    results = []
    for model in (plain, shared):
        logits = model(input_ids=input_ids, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        grads = {n: getattr(p.grad, "_local_tensor", p.grad) for n, p in model.named_parameters() if p.requires_grad}
        results.append((logits.detach(), grads))
    (logits, grads), (other, others) = results
    torch.testing.assert_close(other, logits, rtol=1e-5, atol=1e-5)
    assert sum(g is not None for g in grads.values()) > 4
    for n, grad in grads.items():
        torch.testing.assert_close(others[n], grad, rtol=1e-4, atol=1e-5, msg=n)
