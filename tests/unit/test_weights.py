"""Stored weights, buffers and initial values: what transformers itself would load, without a whole model on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dayzero.config import Lora, Method
from dayzero.engine.model import ModelSource, build_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import ARCHITECTURES

SMALL = {
    **ARCHITECTURES["llama"], "head_dim": 8, "n_positions": 64, "pad_token_id": 0, "num_local_experts": 4,
    "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
    "shared_expert_intermediate_size": 16, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "state_size": 4, "expert_ffn_hidden_size": 16,
}  # fmt: skip

FULL = Method(name="full")


def small(model_type: str) -> Any:
    known = AutoConfig.for_model(model_type)
    names = {*known.to_dict(), *known.attribute_map}
    return AutoConfig.for_model(model_type, **{n: v for n, v in SMALL.items() if n in names and n != "model_type"})


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def save(model_type: str, folder: Path, **fields: Any) -> Path:
    torch.manual_seed(0)
    config = small(model_type)
    config.update(fields)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "model_type",
    ["llama", "gpt2", "gemma2", "mamba", "mixtral", "qwen3_moe", "deepseek_v3", "phimoe", "jamba", "gpt_oss", "opt"],
)
def test_parameters_and_buffers_are_those_of_from_pretrained(model_type: str, tmp_path: Path) -> None:
    save(model_type, tmp_path)
    source = ModelSource(directory=tmp_path)
    got = build_model(source, source.config(), FULL, 0, meta=False)
    want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    values, expected = everything(got), everything(want)
    assert values.keys() == expected.keys()
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    assert got.state_dict().keys() == want.state_dict().keys()  # tied names too


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "modernbert-decoder", "mamba", "mixtral", "apertus", "rwkv"])
def test_random_weights_are_distributed_as_transformers_does(model_type: str) -> None:
    config = small(model_type)
    source = ModelSource(directory=None, architecture={**config.to_diff_dict(), "model_type": model_type})
    got = everything(build_model(source, config, FULL, 0, meta=False))
    torch.manual_seed(0)
    want = everything(AutoModelForCausalLM.from_config(config))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].isfinite().all()
        if value.numel() > 500:
            torch.testing.assert_close(got[name].float().std(), value.float().std(), rtol=0.2, atol=1e-6)
            noise = 6 * (2 / value.numel()) ** 0.5 * value.float().std() + 1e-6  # six standard errors of a difference
            assert (got[name].float().mean() - value.float().mean()).abs() <= noise, name
        elif value.numel() > 1 and value.float().std() == 0:
            assert torch.equal(got[name], value), name


def test_initial_values_follow_the_seed_and_the_name() -> None:
    source = ModelSource(directory=None, architecture=ARCHITECTURES["qwen3"])
    method = Method(name="lora", lora=Lora(rank=4))
    first, again, other = (everything(build_model(source, source.config(), method, s, meta=False)) for s in (1, 1, 2))
    plain = everything(build_model(source, source.config(), FULL, 1, meta=False))
    for name, value in first.items():
        assert torch.equal(again[name], value)
        if "lora_" not in name:
            assert torch.equal(plain[name.replace(".base_layer.", ".")], value)
        if value.std() > 0 and "inv_freq" not in name:
            assert not torch.equal(other[name], value)
    layers = [first[f"model.layers.{i}.self_attn.q_proj.base_layer.weight"] for i in range(3)]
    assert not torch.equal(layers[0], layers[1])
    adapters = [first[f"model.layers.{i}.self_attn.q_proj.lora_A.default.weight"] for i in range(3)]
    assert not torch.equal(adapters[0], adapters[1])
    assert adapters[0].abs().max() <= 1 / 32**0.5  # PEFT's: kaiming uniform with a = sqrt(5)


def test_a_head_stored_beside_the_embeddings_it_is_tied_to(tmp_path: Path) -> None:
    save("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for head in (weights["model.embed_tokens.weight"].clone(), torch.ones(128, 32)):
        save_file({**weights, "lm_head.weight": head}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        source = ModelSource(directory=tmp_path)
        got = build_model(source, source.config(), FULL, 0, meta=False)
        want = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        same = got.lm_head.weight is got.model.embed_tokens.weight
        assert same == (want.lm_head.weight is want.model.embed_tokens.weight)
        assert torch.equal(got.lm_head.weight, want.lm_head.weight)
        assert torch.equal(got.model.embed_tokens.weight, want.model.embed_tokens.weight)


def test_only_the_name_of_the_head_is_stored(tmp_path: Path) -> None:
    save("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = ModelSource(directory=tmp_path)
    got = build_model(source, source.config(), FULL, 0, meta=False)
    assert got.lm_head.weight is got.model.embed_tokens.weight
    assert torch.equal(got.lm_head.weight, weights["lm_head.weight"])
