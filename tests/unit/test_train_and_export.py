"""Through the train and the export stage, which holds the exported model to the logits that training gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dayzero.files import read_json, write_json
from dayzero.stages import export, train
from safetensors.torch import load_file, save_file

from tests.tiny import ARCHITECTURES, write_rows
from tests.train_and_export import train_and_export

Pair = Callable[..., Path]


@pytest.fixture
def trained_and_exported(tmp_path: Path) -> Pair:
    """`train_and_export` in the test's folder."""
    return partial(train_and_export, tmp_path)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_averages_of_bfloat16_weights_are_in_float32(method: str, trained_and_exported: Pair) -> None:
    settings = {"precision": "bf16_pure", "ema": {"decay": 0.5}}
    out = trained_and_exported(
        "llama", torch.float32, settings, method={"name": method}, export={"weights": "ema"}
    )  # fmt: skip
    if method == "lora":
        averages = load_file(out / "adapter_ema/adapter_model.safetensors").values()
        assert any((a != a.bfloat16().float()).any() for a in averages), "rounded as the weights are"


@pytest.mark.parametrize(
    ("stored", "method"),
    [
        (torch.float16, {"name": "lora", "lora": {"rank": 4}}),
        (torch.float32, {"name": "lora", "lora": {"rank": 4, "dora": True, "modules_to_save": ["embed_tokens"]}}),
        (torch.float32, {"name": "full", "freeze": ["*mlp*"]}),
    ],
    ids=["lora", "dora", "frozen"],
)
def test_frozen_weights_that_training_rounds_are_exported_so(
    stored: torch.dtype, method: dict[str, Any], trained_and_exported: Pair
) -> None:
    out = trained_and_exported("llama", stored, {"precision": "bf16_pure"}, method=method)
    if method["name"] == "full":
        name = "model.layers.0.mlp.up_proj.weight"
        base, exported = (
            load_file(out.parent / folder / "model.safetensors")[name].float() for folder in ("base", "model")
        )
        assert torch.equal(exported, base.bfloat16().float())
        assert not torch.equal(exported, base)


@pytest.mark.parametrize("freeze", [["*mlp*"], ["*layers.0*"]], ids=["parts", "a layer"])
def test_frozen_linears_beside_weights_gathered_in_8_bits(freeze: list[str], trained_and_exported: Pair) -> None:
    pytest.importorskip("torchao")
    fp8 = {"emulate": True, "all_gather": True}
    settings = {"precision": "bf16", "fp8": fp8, "ema": {"decay": 0.5}}
    method = {"name": "full", "freeze": freeze}
    trained_and_exported("llama", torch.float32, settings, method=method, export={"weights": "ema"})


def test_adapters_beside_experts_that_stay_frozen(trained_and_exported: Pair) -> None:
    method = {"name": "lora", "lora": {"rank": 4, "dora": True}}
    out = trained_and_exported("qwen3_moe", torch.float32, {"precision": "fp32"}, method=method)
    names = load_file(out / "adapter/adapter_model.safetensors")
    assert any("o_proj" in name for name in names)
    assert not any("mlp" in name for name in names)


def test_adapters_of_an_embedding_and_a_head_that_are_not_tied(trained_and_exported: Pair) -> None:
    lora = {"targets": ["q_proj", "embed_tokens", "lm_head"], "rank": 4}
    out = trained_and_exported(
        "qwen3", torch.float32, {"precision": "fp32"}, method={"name": "lora", "lora": lora}
    )  # fmt: skip
    names = set(load_file(out / "adapter/adapter_model.safetensors"))
    assert {"base_model.model.model.embed_tokens.lora_embedding_A", "base_model.model.lm_head.lora_A.weight"} <= names


def test_what_rounding_explains_is_no_damage(
    trained_and_exported: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged adapters are rounded once more than those that were trained."""
    lora = {"name": "lora", "lora": {"rank": 4}}
    settings = {"max_steps": 3, "global_batch_size": 4, "optimizer": {"lr": 1e-2}, "precision": "fp32"}
    out = trained_and_exported("llama", torch.float32, settings, method=lora)
    config = json.dumps({"experiment": "tiny", "run": "one", "train": settings, "method": lora})
    given = ["--config", config, "--model", str(out.parent / "base"), "--train", str(out)]
    given += ["--output", str(out.parent / "again")]
    monkeypatch.setattr("dayzero.engine.export.TOLERANCE", 1e-9)
    assert export.main(given) == 0
    training = read_json(out.parent / "again/manifest.json")["reload"]["training"]
    assert 1e-9 < training["difference"] <= training["tolerance"] < 1e-5

    probe = load_file(out / "probe.safetensors")
    probe["logits"] += 2e-5  # the largest is less than 1, of which a share is taken then
    save_file(probe, out / "probe.safetensors")
    capsys.readouterr()
    assert export.main(given) == 1
    assert "nothing is exported: the exported and in-training logits differ by 2" in capsys.readouterr().err

    monkeypatch.setattr("dayzero.engine.export.OWN_ROUNDING", 1e9)  # as if a router chose another expert
    assert export.main(given) == 0
    probe["logits"] += 2e-4
    save_file(probe, out / "probe.safetensors")
    capsys.readouterr()
    assert export.main(given) == 1
    assert "logits differ by 0.00022, more than 0.0001 of their size" in capsys.readouterr().err


def test_a_warm_up_that_is_longer_than_the_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How many steps they are is known once it is known how rows are packed."""
    write_rows(tmp_path / "tokens/train", packed=True)
    write_json(tmp_path / "tokens/manifest.json", {"max_token_id": 127, "files": {}})
    trained = {"num_epochs": 2, "global_batch_size": 4, "lr_scheduler": {"warmup_steps": 11}}
    run = {"experiment": "tiny", "run": "one", "method": {"name": "pretrain"}, "train": trained}
    run["model"] = {"architecture": ARCHITECTURES["llama"]}
    given = ["--config", json.dumps(run), "--tokens", str(tmp_path / "tokens"), "--output", str(tmp_path / "out")]
    assert train.main(given) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "train.lr_scheduler: warmup_steps 11 is more than the 10 steps that train.num_epochs 2.0 makes of 20 " in last
    )
