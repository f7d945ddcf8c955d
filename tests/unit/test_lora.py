"""Adapters: they start at the base model, PEFT reads what we write, and the merge is the adapted model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dayzero.config import Lora, Method
from dayzero.console import log
from dayzero.engine.export import streamed_logits
from dayzero.engine.lora import (
    ADAPTER,
    MAGNITUDE,
    inject_lora,
    peft_config,
    save_adapter,
    warn_of_frozen_experts,
)
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.trained_weights import TrainedWeights
from dayzero.errors import ConfigError
from dayzero.files import write_json
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM, PreTrainedModel

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


def empty_llama() -> PreTrainedModel:
    source = ModelSource(directory=None, architecture=ARCHITECTURES["llama"])
    return build_model(source, source.config(), Method(name="full"), seed=0, meta=True)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT, use_cache=False).logits


def test_step_0_is_the_base_model(base: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert torch.equal(logits(adapted(base, Lora(rank=4))), logits(plain))


def test_dora_starts_at_the_base_model_also_on_the_embedding_and_the_head(base: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    lora = Lora(rank=4, dora=True, targets=["q_proj", "embed_tokens", "lm_head"])
    torch.testing.assert_close(logits(adapted(base, lora)), logits(plain), rtol=1e-6, atol=1e-6)


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


WAYS: dict[str, tuple[str, Lora]] = {
    "rslora": ("qwen3", Lora(rank=4, rslora=True)),
    "dora": ("qwen3", Lora(rank=4, dora=True, targets=["q_proj", "down_proj"])),
    "dora on transposed weights": ("gpt2", Lora(rank=4, dora=True)),
    "whole modules": ("qwen3", Lora(rank=4, modules_to_save=["embed_tokens", "lm_head"])),
    "whole tied modules": ("llama", Lora(rank=4, dora=True, modules_to_save=["embed_tokens"])),
}
GPT2 = {"model_type": "gpt2", "vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4}


def source_tied(model: torch.nn.Module) -> dict[str, str]:
    return {n: s for n, s in model.all_tied_weights_keys.items() if model.get_parameter(n) is model.get_parameter(s)}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_agrees_with_peft(way: str, tmp_path: Path) -> None:
    """The forward pass of PEFT's own model, what it reads back, its merge, and ours at export."""
    name, lora = WAYS[way]
    source = ModelSource(directory=None, architecture={**ARCHITECTURES, "gpt2": GPT2}[name])
    build_model(source, source.config(), Method(name="full"), seed=0, meta=False).save_pretrained(tmp_path / "base")
    source = ModelSource(directory=tmp_path / "base")
    method = Method(name="lora", lora=lora)
    model = build_model(source, source.config(), method, seed=3, meta=False).eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-6)  # the update starts at zero

    own = peft_config(lora)
    own.modules_to_save = lora.modules_to_save or None
    own.ensure_weight_tying = name == "llama"
    theirs = get_peft_model(plain, own).eval()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(7)
    with torch.no_grad():
        for n, p in trained.items():
            if MAGNITUDE in n:  # lengths of rows, as PEFT finds them
                torch.testing.assert_close(p, theirs.base_model.model.get_parameter(n), rtol=1e-6, atol=0)
            p.add_(torch.randn_like(p), alpha=0.1)
            inner = theirs.base_model.model.get_submodule(n.rpartition(".")[0])
            inner = getattr(inner, "modules_to_save", {ADAPTER: inner})[ADAPTER]
            inner.get_parameter(n.rpartition(".")[2]).copy_(p)
    expected = logits(model)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))).abs().max() > 1e-2

    train = tmp_path / "train"
    save_adapter(train / "adapter", lora, {n: p.detach() for n, p in trained.items()}, "base", source_tied(model))
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, str(train / "adapter")).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)
    write_json(train / "summary.json", {})
    weights = TrainedWeights(source, None, method, 3, train)
    torch.testing.assert_close(streamed_logits(weights.model, weights.read, INPUT), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "lora", "said"),
    [
        ("llama", Lora(modules_to_save=["embed_token"]), r"'embed_token' matches no module.*are embed_tokens, lm_head; "
         "the nearest names are embed_tokens"),
        ("llama", Lora(modules_to_save=["lm_head"]), r"'lm_head': its weight is model.embed_tokens.weight.*name "
         "embed_tokens instead"),
        ("llama", Lora(targets=["q_proj", "lm_head"]), r"targets \['q_proj', 'lm_head'\]: the model ties lm_head to "
         r"embed_tokens, .* leave lm_head out, or train both whole by method.lora.modules_to_save: \[embed_tokens\]"),
        ("llama", Lora(targets=["q_proj", "embed_tokens"]), r"the model ties embed_tokens to lm_head, .* leave "
         r"embed_tokens out, or train both whole by method.lora.modules_to_save: \[embed_tokens\]"),
        ("llama", Lora(targets=["lm_head", "embed_tokens"]), "the model ties embed_tokens to lm_head"),
        ("llama", Lora(modules_to_save=["mlp"]), "layers.0.mlp is trained whole, so method.lora.targets 'all-lin"),
        ("qwen3_moe", Lora(dora=True, targets=["gate_proj", "up_proj", "down_proj"]),
         "dora: PEFT adapts fused experts without DoRA only: turn it off"),
    ],
)  # fmt: skip
def test_ways_that_cannot_be_are_said(name: str, lora: Lora, said: str) -> None:
    source = ModelSource(directory=None, architecture=ARCHITECTURES[name])
    with pytest.raises(ConfigError, match=said) as refused:
        build_model(source, source.config(), Method(name="lora", lora=lora), seed=0, meta=True)
    assert "\n" not in str(refused.value)


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
        (
            Lora(dropout=0.1, targets=["gate_proj", "up_proj", "down_proj"]),
            r"dropout 0.1: PEFT adapts fused experts without dropout only: set 0",
        ),
        (Lora(targets=["gate_proj"]), r"targets \['gate_proj'\]: .*without also targeting up_proj"),
    ],
)
def test_what_peft_cannot_do_with_experts_is_said(lora: Lora, message: str) -> None:
    source = ModelSource(directory=None, architecture=ARCHITECTURES["qwen3_moe"])
    with pytest.raises(ConfigError, match=message):
        build_model(source, source.config(), Method(name="lora", lora=lora), seed=0, meta=True)


@pytest.mark.parametrize("lora", [Lora(dropout=0.1), Lora(dora=True)], ids=["dropout", "dora"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_stay_frozen_where_peft_cannot_adapt_them(name: str, lora: Lora) -> None:
    source = ModelSource(directory=None, architecture=ARCHITECTURES[name])
    model = build_model(source, source.config(), Method(name="lora", lora=lora), seed=0, meta=True)
    adapted = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= adapted
    assert not any(isinstance(module, ParamWrapper) for module in model.modules())


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
    said = {
        "q_proj": r"'q_proj' match no module \(a text is one regular expression over whole names: for the modules of "
        r"that name write \[q_proj\]\): this model's linear modules are down_proj, .*q_proj",
        ".*query": r"\(a text is one regular expression over whole names\): this model's",
        "all_linear": r"'all_linear' match no module \(did you mean all-linear\?\)",
    }
    for target, message in said.items():
        with pytest.raises(ConfigError, match=message) as refused:
            inject_lora(empty_llama(), Lora(targets=target))
        assert "lm_head" not in str(refused.value), "it is tied, and refused as a target"


def test_targets_that_are_no_linear_name_those_that_are() -> None:
    for target, kind in (("mlp", "LlamaMLP"), ("norm", "LlamaRMSNorm")):
        with pytest.raises(ConfigError, match=rf"a {kind}, which PEFT cannot adapt: .* are down_proj") as refused:
            inject_lora(empty_llama(), Lora(targets=[target]))
        assert "\n" not in str(refused.value)
