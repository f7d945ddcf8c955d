"""Adapters in models that need a second look: modules PEFT refuses, and modules that share their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dayzero.config import Lora, Method
from dayzero.engine.lora import inject_lora, save_adapter
from dayzero.engine.lora_targets import not_adapted, resolve_targets
from dayzero.engine.model import ModelSource, build_model
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny import ARCHITECTURES, VOCAB_SIZE

INPUT = torch.arange(1, 13).unsqueeze(0) % VOCAB_SIZE
LORA = Method(name="lora", lora=Lora(rank=4))


def plain(name: str) -> PreTrainedModel:
    source = ModelSource(directory=None, architecture=ARCHITECTURES[name], random_weights=True)
    return build_model(source, source.config(), Method(name="full"), seed=0, meta=False).eval()


def empty(name: str) -> PreTrainedModel:
    source = ModelSource(directory=None, architecture=ARCHITECTURES[name], random_weights=True)
    return build_model(source, source.config(), Method(name="full"), seed=0, meta=True)


def shake(model: PreTrainedModel) -> None:
    """Adapters start at zero, where nothing that is wrong would show."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)


def loaded_by_peft(model: PreTrainedModel, method: Method, folder: Path) -> PeftModel:
    """`model`'s adapter, written beside `folder/base` and loaded over it as a user does; it gives the same logits."""
    save_adapter(folder / "adapter", method.lora, model.state_dict(), base_model=str(folder / "base"))
    fresh = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, str(folder / "adapter")).eval()
    same_logits(loaded, model(input_ids=INPUT, use_cache=False).logits)
    return loaded


def same_logits(model: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(model(input_ids=INPUT, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def test_what_peft_refuses_is_left_out_of_all_linear_and_the_adapter_names_the_rest(tmp_path: Path) -> None:
    plain("mamba").save_pretrained(tmp_path / "base")
    base = empty("mamba")
    method = resolve_targets(base, LORA)
    assert all(p.requires_grad for p in base.parameters())
    # PEFT refuses out_proj; the model reads dt_proj's weight and never calls it
    assert not_adapted(base, method) == ["dt_proj", "out_proj"]
    model = build_model(ModelSource(directory=tmp_path / "base"), base.config, LORA, seed=0, meta=False).eval()
    adapted = {n.rpartition(".lora_")[0].rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"in_proj", "x_proj"}
    shake(model)
    loaded_by_peft(model, method, tmp_path)


@pytest.mark.parametrize("name", ["llama", "mixtral", "opt"])
def test_all_linear_stays_all_linear_where_peft_takes_it(name: str) -> None:
    assert resolve_targets(empty(name), LORA) == LORA
    assert not_adapted(empty(name), LORA) == []


def test_named_targets_are_left_alone() -> None:
    named = Method(name="lora", lora=Lora(targets=["out_proj"]))
    assert resolve_targets(empty("mamba"), named) == named


def test_fused_experts_that_peft_does_not_know_are_adapted(tmp_path: Path) -> None:
    plain("gpt_oss").save_pretrained(tmp_path / "base")
    method = resolve_targets(empty("gpt_oss"), LORA)
    assert method.lora.targets == "all-linear"
    assert len(method.lora.target_parameters) == 2 * 4  # two matrices in each layer
    config = plain("gpt_oss").config
    model = build_model(ModelSource(directory=tmp_path / "base"), config, LORA, seed=0, meta=False).eval()
    shake(model)
    loaded = loaded_by_peft(model, method, tmp_path)
    same_logits(loaded.merge_and_unload(), model(input_ids=INPUT, use_cache=False).logits)
    with_dropout = Method(name="lora", lora=Lora(rank=4, dropout=0.1))
    assert resolve_targets(empty("gpt_oss"), with_dropout) == with_dropout  # experts stay frozen


def test_a_router_that_gives_two_tensors_is_left_out() -> None:
    class Router(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            return x, super().forward(x)

    model = empty("llama")
    model.model.layers[1].router = Router(32, 4, device="meta")
    method = resolve_targets(model, LORA)
    assert not_adapted(model, method) == ["router"]


def test_modules_of_one_weight_have_one_adapter() -> None:
    model = plain("llama")
    first, second = model.model.layers[0].mlp, model.model.layers[2].mlp
    second.up_proj.weight = first.up_proj.weight
    inject_lora(model, Lora(rank=4))
    assert second.up_proj.lora_A is first.up_proj.lora_A
    assert second.up_proj.lora_B is first.up_proj.lora_B
    assert second.gate_proj.lora_A is not first.gate_proj.lora_A
    shake(model)
    expected = model(input_ids=INPUT, use_cache=False).logits
    weight = first.up_proj.get_base_layer().weight
    with torch.no_grad():  # merged once, it is right in both places
        weight.add_(first.up_proj.get_delta_weight("default"))
        for layer in (first.up_proj, second.up_proj):
            layer.lora_B["default"].weight.zero_()
    same_logits(model, expected)
