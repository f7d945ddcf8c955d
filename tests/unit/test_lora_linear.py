"""The fused LoRA operation against PEFT's own forward and backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dayzero.config import Fp8, Lora
from dayzero.engine.activation_checkpointing import apply_activation_checkpointing
from dayzero.engine.compiling import compile_layers
from dayzero.engine.float8 import convert_to_float8, frozen_float8
from dayzero.engine.lora import inject_lora
from dayzero.engine.lora_groups import same_input, share_inputs
from dayzero.engine.lora_linear import FusedLoraLinear, fuse_lora
from dayzero.engine.structure import find_layers
from peft import LoraConfig, inject_adapter_in_model
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny import ARCHITECTURES, VOCAB_SIZE


def adapted(name: str, lora: Lora, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    fields = dict(ARCHITECTURES[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    inject_lora(model, lora)
    for n, parameter in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(parameter, std=0.1)  # PEFT's zeros would hide half of the operation
    return model


def gradients(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(0, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().logsumexp(-1).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_same(model: PreTrainedModel, wanted: PreTrainedModel, of_logits: Any, of_gradients: Any) -> None:
    """Logits and gradients within these tolerances."""
    expected, expected_gradients = gradients(wanted)
    logits, found = gradients(model)
    torch.testing.assert_close(logits, expected, **of_logits)
    assert set(found) == set(expected_gradients) != set()
    for n, gradient in found.items():
        torch.testing.assert_close(gradient, expected_gradients[n], **of_gradients, msg=n)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "stablelm"])
def test_equals_peft_in_value_and_gradient(name: str, shared: bool, rslora: bool) -> None:
    peft = adapted(name, Lora(rank=3, alpha=7.0, rslora=rslora), torch.float64)
    fused = copy.deepcopy(peft)
    assert fuse_lora(fused) > 20
    assert not shared or share_inputs(fused) >= len(find_layers(fused))
    check_same(fused, peft, {"rtol": 1e-10, "atol": 1e-10}, {"rtol": 1e-9, "atol": 1e-10})


@pytest.mark.parametrize(("name", "checkpointing"), [("llama", "none"), ("stablelm", "none"), ("llama", "selective")])
def test_compiled_layers_have_the_same_gradients(name: str, checkpointing: str) -> None:
    plain = adapted(name, Lora(rank=3, alpha=7.0))
    fuse_lora(plain)
    share_inputs(plain)
    compiled = copy.deepcopy(plain)
    torch._dynamo.reset()
    counters.clear()
    apply_activation_checkpointing(find_layers(compiled), checkpointing)
    compile_layers(find_layers(compiled))
    check_same(compiled, plain, {"rtol": 1e-5, "atol": 1e-5}, {"rtol": 1e-5, "atol": 1e-5})
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # the first layer's input has no gradient


def test_an_input_of_no_tokens() -> None:
    """As an expert that nobody chose may get."""
    model = adapted("llama", Lora(rank=3))
    fuse_lora(model)
    module = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    assert module(torch.zeros(0, module.in_features)).shape == (0, module.out_features)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_equals_peft_around_weights_in_8_bits(recipe: Any) -> None:
    source = adapted("qwen3", Lora(rank=3, alpha=7.0))
    peft = copy.deepcopy(source)
    convert_to_float8(peft, Fp8(recipe=recipe, emulate=True))
    for name, module in frozen_float8(peft).items():
        module.quantize(source.get_submodule(name).weight)
    fused = copy.deepcopy(peft)
    assert fuse_lora(fused) == len(frozen_float8(fused)) > 20
    share_inputs(fused)
    expected, expected_gradients = gradients(peft)
    logits, found = gradients(fused)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert set(found) == set(expected_gradients) != set()
    for n, gradient in found.items():  # each rounds its own gradients to 8 bits
        assert (gradient - expected_gradients[n]).norm() <= 1e-2 * expected_gradients[n].norm(), n
    plain, _ = gradients(source)
    assert (plain - logits).norm() > 1e-3 * plain.norm()


def test_in_bfloat16_it_is_no_further_from_the_truth_than_peft() -> None:
    peft = adapted("llama", Lora(rank=3), torch.bfloat16)
    for parameter in peft.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)  # as FSDP2's policy does with the adapters
    fused = copy.deepcopy(peft)
    fuse_lora(fused)
    share_inputs(fused)
    truth, true_gradients = gradients(copy.deepcopy(peft).to(torch.float64))
    errors = []
    for model in (peft, fused):
        logits, found = gradients(model)
        misses = [(found[n].double() - g).norm() / g.norm() for n, g in true_gradients.items()]
        errors.append(((logits.double() - truth).norm().item(), torch.stack(misses).mean().item()))
    (by_peft, gradients_by_peft), (by_fused, gradients_by_fused) = errors
    assert by_fused < 1.2 * by_peft
    assert gradients_by_fused < 1.2 * gradients_by_peft


@pytest.mark.parametrize("change", [{"dropout": 0.1}])
def test_what_is_more_than_a_plain_adapter_is_left_to_peft(change: dict[str, float]) -> None:
    assert fuse_lora(adapted("llama", Lora(rank=2, **change))) == 0  # type: ignore[arg-type]


def test_modules_with_the_same_input_are_found_by_watching() -> None:
    model = adapted("llama", Lora(rank=2))
    assert same_input(model) == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ]
    fuse_lora(model)
    layers = find_layers(model)
    assert share_inputs(model) == 2 * len(layers)
    assert share_inputs(adapted("llama", Lora(rank=2))) == 0  # nothing fused
    one = adapted("llama", Lora(rank=2, targets=["q_proj", "down_proj"]))
    fuse_lora(one)
    assert share_inputs(one) == 0


def test_one_of_a_group_called_with_another_tensor_is_computed_by_itself() -> None:
    model = adapted("llama", Lora(rank=2))
    fuse_lora(model)
    share_inputs(model)
    attention: Any = find_layers(model)[0].self_attn
    x, y = torch.randn(2, 3, attention.q_proj.in_features), torch.randn(1, 4, attention.q_proj.in_features)
    wanted = [super(FusedLoraLinear, m).forward for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
    query = attention.q_proj(x)
    key = attention.k_proj(y)  # not what the queries' call computed
    value = attention.v_proj(x)
    again = attention.k_proj(x)  # the group's outputs have been given away
    for got, (forward, given) in zip(
        (query, key, value, again), zip(wanted[:1] + wanted[1:] + wanted[1:2], (x, y, x, x), strict=True), strict=True
    ):
        torch.testing.assert_close(got, forward(given))
    assert attention.q_proj.shared.x is None
    assert attention.q_proj.shared.outputs == []


def test_trained_base_weights_are_left_to_peft() -> None:
    model = adapted("llama", Lora(rank=2, targets=["q_proj"]))
    model.requires_grad_(True)
    assert fuse_lora(model) == 0


def test_mixed_dtypes_and_disabled_adapters_go_through_peft() -> None:
    model = adapted("llama", Lora(rank=2))
    expected, _ = gradients(copy.deepcopy(model))
    fuse_lora(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = gradients(model)
    assert 0 < (under_autocast.float() - expected).abs().max() < 0.1 * expected.abs().max()
    module = next(m for m in model.modules() if isinstance(m, FusedLoraLinear))
    module.enable_adapters(False)
    x = torch.randn(3, module.in_features)
    torch.testing.assert_close(module(x), module.base_layer(x))


def test_what_it_gives_may_be_written_into() -> None:
    """Some models add to a linear's output in place, which autograd forbids for a view that a Function returns."""
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), layer)
    fuse_lora(layer)
    assert isinstance(layer[0], FusedLoraLinear)
    x = torch.randn(2, 5, 4)
    out = layer(x)
    out[..., 0] += 1.0
    out.sum().backward()
    assert layer[0].lora_B["default"].weight.grad is not None
