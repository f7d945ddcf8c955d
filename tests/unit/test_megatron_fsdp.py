"""Where and with what the strategy megatron_fsdp is refused, each in one line with the remedy."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dayzero.config import Method, RunConfig
from dayzero.config_checks import impossible
from dayzero.engine.megatron_fsdp import check_megatron_fsdp, require_gradients, require_megatron_fsdp
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.errors import ConfigError
from dayzero.files import write_json
from dayzero.stages import train
from torch import nn

from tests.tiny import ARCHITECTURES, write_rows

NEEDS = "parallelism.strategy megatron_fsdp needs an NVIDIA GPU and the package megatron-fsdp, but "


def machine(patch: pytest.MonkeyPatch, *, gpu: bool, cuda: str | None = "13.0", package: bool = True) -> None:
    found = importlib.util.find_spec
    patch.setattr(torch.cuda, "is_available", lambda: gpu)
    patch.setattr(torch.version, "cuda", cuda)
    patch.setattr(importlib.util, "find_spec", lambda name: package or None if name == "megatron_fsdp" else found(name))


def test_what_the_machine_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpu=True)
    require_megatron_fsdp()
    no_gpu, no_package = "no NVIDIA GPU that torch can use", r"not installed \(pip install megatron-fsdp\)"
    for present, said in (
        ({"gpu": False}, rf"{NEEDS}.*{no_gpu}: use fsdp2$"),
        ({"gpu": True, "cuda": None}, rf"{NEEDS}.*{no_gpu}: use fsdp2$"),  # torch for AMD's GPUs
        ({"gpu": True, "package": False}, rf"{NEEDS}the package is {no_package}: use fsdp2$"),
        ({"gpu": False, "package": False}, rf"{NEEDS}.*{no_gpu} and .*{no_package}: use fsdp2$"),
    ):
        machine(monkeypatch, **present)
        with pytest.raises(ConfigError, match=said):
            require_megatron_fsdp()


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"cp": 2}, {"pp": 2}, {"dp_replicate": 2}])
def test_it_shards_rows_and_nothing_else(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"megatron_fsdp has dp_shard alone, but .* = 4: use fsdp2"):
        ParallelDims(strategy="megatron_fsdp", world_size=4, dp_shard=2, **sizes)
    ParallelDims(strategy="megatron_fsdp", world_size=4, dp_shard=4)


def test_experts_stay_where_they_are() -> None:
    with pytest.raises(ConfigError, match="ep: 2 needs strategy fsdp2, not megatron_fsdp"):
        ParallelDims(strategy="megatron_fsdp", world_size=4, dp_shard=4, ep=2)


def settings(**sections: Any) -> RunConfig:
    run = {
        "experiment": "e",
        "run": "r",
        "model": {"architecture": ARCHITECTURES["qwen3"]},
        "method": {"name": "pretrain"},
        "tokenize": {"seq_len": 128},
        "parallelism": {"strategy": "megatron_fsdp", "dp_shard": 2},
        "train": {"max_steps": 2, "global_batch_size": 8},
    }
    return RunConfig.model_validate({**run, **sections})


@pytest.mark.parametrize(
    ("sections", "key", "said"),
    [
        ({"train": {"max_steps": 2, "compile": True}}, "train.compile", "is not tried with parallelism.strategy"),
        ({"method": {"name": "lora"}}, "parallelism.strategy", "method.name lora freezes weights, which Megatron-FSDP"),
    ],
)
def test_settings_that_do_not_go_with_it(sections: dict[str, Any], key: str, said: str) -> None:
    def found(run: RunConfig) -> list[str]:
        return [f.message for f in impossible(run) if f.key == key and "megatron" in f.message.lower()]

    assert found(settings()) == []
    (message,) = found(settings(**sections))
    assert message.startswith(said)
    assert message.endswith("use fsdp2")


def model(name: str, method: str = "full") -> nn.Module:
    source = ModelSource(directory=None, architecture=ARCHITECTURES[name], random_weights=True)
    return build_model(source, source.config(), Method(name=method), 0, meta=True)


def test_models_that_it_would_train_wrongly() -> None:
    check_megatron_fsdp(model("qwen3"))
    check_megatron_fsdp(model("mixtral"))
    with pytest.raises(ConfigError, match=r"embed_tokens.weight and lm_head.weight are one parameter, .*: use fsdp2$"):
        check_megatron_fsdp(model("llama"))
    with pytest.raises(ConfigError, match=r"embed_tokens.weight is frozen, and Megatron-FSDP frees .*: use fsdp2$"):
        check_megatron_fsdp(model("qwen3", "lora"))
    scale = nn.Module()
    scale.scale = nn.Parameter(torch.zeros(()))
    with pytest.raises(ConfigError, match=r": scale is a single number, .*: use fsdp2$"):
        check_megatron_fsdp(scale)


def test_gradients_that_the_package_dropped() -> None:
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    require_gradients(layer)
    layer.bias.grad = None
    with pytest.raises(ConfigError, match=r"bias and 0 other parameters got no gradient, .*: use fsdp2$"):
        require_gradients(layer)


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_stage_says_it_before_a_process_starts(
    by_hand: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also on each rank of a torchrun started by hand."""
    write_rows(tmp_path / "tokens/train", packed=True)
    write_json(tmp_path / "tokens/manifest.json", {"max_token_id": 127})
    (tmp_path / "config.json").write_text(json.dumps(settings().resolved()))
    machine(monkeypatch, gpu=False)
    if by_hand:
        for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}.items():
            monkeypatch.setenv(name, value)
    arguments = ["--config", str(tmp_path / "config.json"), "--tokens", str(tmp_path / "tokens")]
    assert train.main([*arguments, "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"train: error: {NEEDS}")
    assert not (tmp_path / "out").exists()


def test_the_stage_refuses_tied_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "tokens/train", packed=True)
    write_json(tmp_path / "tokens/manifest.json", {"max_token_id": 127})
    run = settings(model={"architecture": ARCHITECTURES["llama"]})
    (tmp_path / "config.json").write_text(json.dumps(run.resolved()))
    monkeypatch.setattr("dayzero.stages.training.checks.require_megatron_fsdp", lambda: None)
    arguments = ["--config", str(tmp_path / "config.json"), "--tokens", str(tmp_path / "tokens")]
    assert train.main([*arguments, "--output", str(tmp_path / "out")]) == 1
    assert "are one parameter, which Megatron-FSDP would train as two" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
