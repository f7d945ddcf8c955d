"""A model that sees what it is to predict is refused before it learns to copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dayzero.config import Method, Train
from dayzero.engine.model import ModelSource
from dayzero.engine.packing import any_leak, require_causal
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.passes import training_logits
from dayzero.errors import ConfigError
from dayzero.files import read_json, write_json
from dayzero.stages import train
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import ARCHITECTURES, write_rows
from tests.unit import transformer_engine_double

ENCODER = {
    "model_type": "bert-generation",
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def model(architecture: dict[str, Any], precision: str, method: str = "pretrain", **more: Any) -> ParallelModel:
    return ParallelModel(
        source=ModelSource(directory=None, architecture=architecture, random_weights=True),
        method=Method(name=method),  # type: ignore[arg-type]
        train=Train(max_steps=1, precision=precision, **more),  # type: ignore[arg-type]
        dims=ParallelDims(world_size=1, strategy="none"),
        seed=0,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_encoder_is_refused_and_the_same_as_a_decoder_is_not(precision: str) -> None:
    with pytest.raises(ConfigError, match=r"BertGenerationDecoder reads later tokens .*is_decoder"):
        require_causal(model(ENCODER, precision))
    require_causal(model({**ENCODER, "is_decoder": True}, precision))


@pytest.mark.parametrize("name", ["llama", "mixtral", "mamba", "gpt_oss", "opt"])
def test_causal_models_pass(name: str) -> None:
    for precision in ("fp32", "bf16"):
        require_causal(model(ARCHITECTURES[name], precision))


LOUD = {**ARCHITECTURES["llama"], "initializer_range": 0.2}
"""With logits that rounding to 8 bits moves."""

TOKENS = torch.arange(24).unsqueeze(0)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("method", ["pretrain", "lora"])
def test_products_of_8_bits_are_no_view_of_other_tokens(method: str, recipe: str) -> None:
    """One scale for all tokens: each one's rounding depends on the others, which is neither kind of leak."""
    if method == "pretrain":
        pytest.importorskip("torchao")
    converted = model(LOUD, "bf16", method, fp8={"recipe": recipe, "emulate": True})
    before = training_logits(converted, TOKENS, TOKENS)
    require_causal(converted)
    assert any_leak(converted) is None
    assert torch.equal(training_logits(converted, TOKENS, TOKENS), before), "training's own products are back"
    plain = training_logits(model(LOUD, "bf16", method), TOKENS, TOKENS)
    assert (before - plain).abs().max() > 1e-2 * plain.abs().max(), "nothing was rounded to 8 bits"


@pytest.mark.parametrize("method", ["pretrain", "lora"])
def test_transformer_engine_is_probed_without_its_autocast(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer_engine_double.install(monkeypatch)
    converted = model(LOUD, "bf16", method, fp8={"backend": "transformer_engine", "recipe": "tensorwise"})
    require_causal(converted)
    assert any_leak(converted) is None
    assert {*transformer_engine_double.seen} == {None}
    training_logits(converted, TOKENS, TOKENS)
    assert transformer_engine_double.seen[-1] == "Float8CurrentScaling"


@pytest.mark.parametrize("method", ["pretrain", "lora"])
def test_one_scale_a_tensor_goes_through_the_train_stage(method: str, tmp_path: Path) -> None:
    """Over FSDP2, which gathers trained weights in 8 bits."""
    pytest.importorskip("torchao")
    write_rows(tmp_path / "tokens/train", packed=True)
    write_json(tmp_path / "tokens/manifest.json", {"max_token_id": 127, "files": {}})
    fp8 = {"emulate": True, "all_gather": method == "pretrain"}
    trained = {"max_steps": 1, "global_batch_size": 4, "precision": "bf16", "fp8": fp8}
    run = {"experiment": "tiny", "run": "one", "method": {"name": method}, "train": trained}
    arguments = ["--tokens", str(tmp_path / "tokens"), "--output", str(tmp_path / "out")]
    if method == "lora":
        arguments += ["--model", str(_base(tmp_path / "base"))]
    else:
        run["model"] = {"architecture": LOUD}
    assert train.main(["--config", json.dumps(run), *arguments]) == 0
    assert read_json(tmp_path / "out/summary.json")["steps"] == 1


def _base(path: Path) -> Path:
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LOUD)).save_pretrained(path)
    return path
