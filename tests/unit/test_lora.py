"""Adapters: they start at the base model, PEFT reads what we write, and the merge is the adapted model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dayzero.config import Lora, Method
from dayzero.console import log
from dayzero.engine.lora import inject_lora, save_adapter, warn_of_frozen_experts
from dayzero.engine.model import ModelSource, build_model
from dayzero.errors import ConfigError
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.tiny import ARCHITECTURES, VOCAB_SIZE

INPUT = torch.arange(1, 13).unsqueeze(0) % VOCAB_SIZE


@pytest.fixture
def base(tmp_path: Path) -> Path:
    source = ModelSource(directory=None, architecture=ARCHITECTURES["qwen3"])
    build_model(source, source.config(), Method(name="full"), seed=0, meta=False).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, lora: Lora) -> torch.nn.Module:
    source = ModelSource(directory=base)
    return build_model(source, source.config(), Method(name="lora", lora=lora), seed=3, meta=False).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT, use_cache=False).logits


def test_step_0_is_the_base_model(base: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert torch.equal(logits(adapted(base, Lora(rank=4))), logits(plain))


def test_only_adapters_are_trained_and_the_head_has_none(base: Path) -> None:
    model = adapted(base, Lora(rank=4))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    assert not any("lm_head" in n for n in trained)
    assert len(trained) == 4 * 7 * 2  # layers x projections x (A, B)


def test_the_seed_decides_the_adapters(base: Path) -> None:
    one, same = adapted(base, Lora(rank=4)), adapted(base, Lora(rank=4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))


def test_peft_reads_the_adapter_and_the_merge_agrees(base: Path, tmp_path: Path) -> None:
    lora = Lora(rank=4, alpha=12.0, targets=["q_proj", "down_proj"])
    model = adapted(base, lora)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    expected = logits(model)
    save_adapter(tmp_path / "adapter", lora, model.state_dict(), base_model=str(base))

    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(base).eval())).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_peft_reads_the_adapters_of_fused_experts(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ModelSource(directory=None, architecture=ARCHITECTURES[name], random_weights=True)
    build_model(source, source.config(), Method(name="full"), seed=0, meta=False).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", Lora(rank=4))
    with monkeypatch.context() as patch:
        patch.setattr(log, "propagate", True)
        warn_of_frozen_experts(model, Lora(rank=4))
    assert "reach no expert" not in caplog.text
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    expected = logits(model)
    save_adapter(tmp_path / "adapter", Lora(rank=4), model.state_dict(), base_model=str(tmp_path / "base"))
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(dropout=0.1), r"dropout 0.1: PEFT adapts fused experts without dropout only: set 0"),
        (Lora(targets=["gate_proj"]), r"targets \['gate_proj'\]: .*without also targeting up_proj"),
    ],
)
def test_what_peft_cannot_do_with_experts_is_said(lora: Lora, message: str) -> None:
    source = ModelSource(directory=None, architecture=ARCHITECTURES["qwen3_moe"])
    with pytest.raises(ConfigError, match=message):
        build_model(source, source.config(), Method(name="lora", lora=lora), seed=0, meta=True)


def test_experts_without_adapters_are_said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = Lora(targets=["q_proj"])
    source = ModelSource(directory=None, architecture=ARCHITECTURES["mixtral"])
    model = build_model(source, source.config(), Method(name="lora", lora=lora), seed=0, meta=True)
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level("WARNING", logger=log.name):
        warn_of_frozen_experts(model, lora)
    assert "reach no expert: their 98304 parameters stay frozen" in caplog.text


def test_targets_that_match_nothing_name_those_that_would(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ConfigError, match=r"'query'.*match no module.*down_proj.*q_proj"):
        inject_lora(model, Lora(targets=["query"]))
