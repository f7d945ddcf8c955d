"""What training and export refuse before, or while, they load a model: each in one line that names the thing."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dayzero.config import Lora, Method, RunConfig
from dayzero.engine.lora import inject_lora
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.packing import packing_leak
from dayzero.errors import ConfigError, DataError
from dayzero.files import read_json, write_json
from dayzero.stages import export, train
from dayzero.stages.training.inputs import identity
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.tiny import ARCHITECTURES, write_rows
from tests.tiny_tokenizer import tiny_tokenizer

FULL = Method(name="full")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "model"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURES["llama"])).save_pretrained(path)
    return path


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "model")


def _weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def _build(path: Path) -> Any:
    source = ModelSource(directory=path)
    return build_model(source, source.config(), FULL, 0, meta=False)


def test_missing_weights_are_never_random(copy: Path) -> None:
    _weights(copy, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(DataError, match=r"model: its weights lack model\.layers\.1\.mlp\.up_proj\.weight, which its"):
        _build(copy)


def test_weights_of_another_shape(copy: Path) -> None:
    _weights(copy, lambda w: w.update({"model.norm.weight": torch.ones(5)}))
    with pytest.raises(DataError, match=r"model\.norm\.weight do not fit .* is \[5\], the config says \[32\]"):
        _build(copy)


def test_weights_without_a_place_are_said(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("dayzero.pretrained.log.warning", lambda text, *values: said.append(text % values))
    _weights(copy, lambda w: w.update({"model.layers.9.extra.weight": torch.ones(5)}))
    _build(copy)
    assert len(said) == 1
    assert "no place for the weights model.layers.9.extra.weight" in said[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_hiden_layers": 3}, r"llama has no field num_hiden_layers \(did you mean num_hidden_layers\?\)"),
        ({"model_type": "lama"}, r"model_type 'lama' is unknown \(did you mean llama\?\)"),
        ({"model_type": "t5"}, "'t5' is not a causal language model: choose one"),
        ({"hidden_size": "abc"}, "llama cannot have these values: .*'hidden_size' expected int, got str"),
        ({"num_attention_heads": 5}, "llama cannot have these values: .*not a multiple"),
    ],
)
def test_architectures(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.architecture.*{said}") as refused:
        ModelSource(directory=None, architecture={**ARCHITECTURES["llama"], **fields}).config()
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value)


def test_a_field_may_go_by_its_common_name() -> None:
    config = ModelSource(directory=None, architecture={"model_type": "gpt2", "hidden_size": 48, "n_head": 4}).config()
    assert config.n_embd == 48


def test_directories_without_a_causal_model(copy: Path) -> None:
    write_json(copy / "config.json", {**read_json(copy / "config.json"), "model_type": "t5"})
    with pytest.raises(ConfigError, match="model: model_type 't5' is not a causal language model"):
        _build(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no model \(no config\.json\): run the fetch_model stage first"):
        _build(copy)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["foo"], "targets 'foo' match no module: this model's linear modules are down_proj"),
        (["q_proj", "v_porj"], "targets 'v_porj' match no module"),
        (r".*\.nothing", r"match no module \(a text is one regular expression over whole names\): this model's"),
        ("((", "is no regular expression"),
    ],
)
def test_lora_targets(base: Path, targets: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        inject_lora(_build(base), Lora(targets=targets))


def test_broken_weights_are_not_taken_for_a_leak() -> None:
    def broken(ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.full((*ids.shape, 8), float("nan"))

    assert packing_leak(broken, 8, "fp32") is None


# the stages' own lines
def _config(path: Path, **sections: Any) -> str:
    run = {"experiment": "tiny", "run": "one", "train": {"max_steps": 2, "global_batch_size": 4}, **sections}
    file = path / "config.json"
    write_json(file, RunConfig.model_validate_json(json.dumps(run)).resolved())
    return str(file)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    write_rows(tmp_path / "tokens/train", packed=True)
    write_json(tmp_path / "tokens/manifest.json", {"max_token_id": 127})
    return tmp_path / "tokens"


def _last_line(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.strip().splitlines()[-1]


Refused = Callable[..., str]


@pytest.fixture
def refused(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the train stage on a config of these sections, with more arguments: its one line, having written nothing."""

    def run(*arguments: str | Path, **sections: Any) -> str:
        config, out = _config(tmp_path, **sections), tmp_path / "out"
        given = ["--config", config, "--tokens", tokens, "--output", out, *arguments]
        assert train.main([str(argument) for argument in given]) == 1
        assert not out.exists()
        return _last_line(capsys)

    return run


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_position_embeddings": 16}, "but the model's context is 16: set it to 16 or less"),
        ({"vocab_size": 100}, "has the token id 127, but the model's vocab_size is 100: use the model's own tokenizer"),
        ({"model_type": "t5"}, "model_type 't5' is not a causal language model"),
    ],
)
def test_rows_that_do_not_fit_the_model(changed: dict[str, Any], said: str, copy: Path, refused: Refused) -> None:
    write_json(copy / "config.json", {**read_json(copy / "config.json"), **changed})
    last = refused("--model", copy, method={"name": "full"})
    assert last.startswith("train: error: ")
    assert said in last


def test_a_default_context_of_a_new_architecture(refused: Refused) -> None:
    fields = {**ARCHITECTURES["llama"], "max_position_embeddings": 16}
    last = refused(method={"name": "pretrain"}, model={"architecture": fields})
    assert "tokenize.seq_len 1024: " in last
    assert "the model's context is 16" in last


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"pp": 5}, "parallelism.pp: pp 5 > 4 layers: use at most pp 4"),
        ({"pp": 3, "pp_schedule": "interleaved"}, "pp 3 x 2 of interleaved = 6 stages > 4 layers: use at most pp 2"),
        ({"pp": 9}, "global_batch_size 8 / (local_batch_size 1 * dp 1) = 8 micro-batches < pp 9"),
    ],
)
def test_a_pipeline_that_does_not_fit(sizes: dict[str, Any], said: str, refused: Refused) -> None:
    model = {"architecture": ARCHITECTURES["llama"]}
    rows = {"max_steps": 2, "global_batch_size": 8, "local_batch_size": 1}
    assert said in refused(method={"name": "pretrain"}, model=model, parallelism=sizes, train=rows)


def test_heads_that_ulysses_cannot_split(refused: Refused) -> None:
    last = refused(
        method={"name": "pretrain"},
        model={"architecture": ARCHITECTURES["llama"]},
        parallelism={"cp": 3, "cp_method": "ulysses"},
    )
    # said before a rank is started
    assert last.startswith("train: error: parallelism.cp 3: ulysses splits num_attention_heads 4 / 3 = 1.333: use a ")


@pytest.mark.parametrize(
    ("model", "sections", "said"),
    [
        ("llama", {"parallelism": {"dp_shard": 2, "ep": 2}}, "ep 2: LlamaForCausalLM has no grouped experts"),
        ("mixtral", {"parallelism": {"dp_shard": 3, "ep": 3}}, "has experts 4 / 3 = 1.333: use a divisor of 4"),
        ("llama", {"router_aux_loss_coef": 0.1}, "LlamaForCausalLM defines no load balancing loss of router logits"),
        ("mixtral", {"router_aux_loss_coef": 0.1, "parallelism": {"tp": 2, "sequence_parallel": True}},
         "router_aux_loss_coef 0.1: with sequence_parallel no rank has the router logits of all its tokens"),
    ],
)  # fmt: skip
def test_experts_that_the_model_does_not_have(
    model: str, sections: dict[str, Any], said: str, refused: Refused
) -> None:
    sections = dict(sections)
    trained = {"max_steps": 2, "global_batch_size": 12, "local_batch_size": 2}
    if "router_aux_loss_coef" in sections:
        trained["router_aux_loss_coef"] = sections.pop("router_aux_loss_coef")
    sections |= {"method": {"name": "pretrain"}, "model": {"architecture": ARCHITECTURES[model]}}
    assert said in refused(train=trained, tokenize={"seq_len": 128}, **sections)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"method": {"name": "qlora"}},
            "method.name qlora needs an NVIDIA GPU and the package bitsandbytes, but this machine has no NVIDIA GPU",
        ),
        (
            {"loss": "liger_fused"},
            "train.loss liger_fused: needs a GPU, and none is here: use auto, which takes the best",
        ),
        (
            {"method": {"name": "full", "freeze": ["norm"]}},
            "method.freeze 'norm' matches no trained parameter: write *",
        ),
        (
            {"method": {"name": "lora", "lora": {"targets": ["query"]}}},
            "match no module: this model's linear modules are",
        ),
        ({"method": {"name": "kd", "kd": {"teacher": "big"}}}, "--teacher belongs to kd, and only to it"),
    ],
)
def test_methods_and_losses_that_cannot_be_had(
    sections: dict[str, Any], said: str, base: Path, refused: Refused
) -> None:
    rows = {"max_steps": 2, "global_batch_size": 4, **({"loss": sections["loss"]} if "loss" in sections else {})}
    others = {name: value for name, value in sections.items() if name != "loss"}
    assert said in refused("--model", base, train=rows, **others)


@pytest.mark.parametrize("other", ["tokens", "vocabulary", "nothing"])
def test_a_teacher_with_another_tokenizer(other: str, copy: Path, tmp_path: Path, refused: Refused) -> None:
    tiny_tokenizer(copy)
    teacher = shutil.copytree(copy, tmp_path / "teacher")
    write_json(teacher / "manifest.json", {"files": {}})
    if other == "tokens":
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        tokenizer.add_tokens(["<new>"])
        tokenizer.save_pretrained(teacher)
    if other == "vocabulary":
        fields = {**ARCHITECTURES["llama"], "vocab_size": 160}
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(teacher)
    if other == "nothing":
        (teacher / "manifest.json").unlink()
    said = {
        "tokens": "method.kd.teacher big: its tokenizer is another one",
        "vocabulary": "method.kd.teacher big: its vocabulary has 160 entries, the model's 128: use a teacher with",
        "nothing": "has no manifest.json: finish the stage that makes it first",
    }
    method = {"name": "kd", "kd": {"teacher": "big"}}
    assert said[other] in refused("--model", copy, "--teacher", teacher, method=method)


@pytest.mark.parametrize(
    ("fields", "trained", "said"),
    [
        ({}, {"kernels": "liger"}, "train.kernels liger needs an NVIDIA GPU and the package liger-kernel, but "),
        ({}, {"attention": "varlen"}, "train.attention varlen trains on NVIDIA GPUs only"),
        ({}, {"fp8": {}}, "train.fp8 needs an NVIDIA GPU of compute capability 8.9 or later"),
        (
            {},
            {"fp8": {"backend": "transformer_engine"}},
            "train.fp8.backend transformer_engine needs an NVIDIA GPU and the package transformer-engine[pytorch], ",
        ),
        (
            {"intermediate_size": 40},
            {"fp8": {"emulate": True}},
            "train.fp8: sizes that are not multiples of 16: model.layers.0.mlp.gate_proj 40 x 32, ",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_kernels_and_precisions_that_the_machine_or_the_model_does_not_have(
    fields: dict[str, Any], trained: dict[str, Any], said: str, refused: Refused
) -> None:
    model = {"architecture": {**ARCHITECTURES["llama"], **fields}}
    rows = {"max_steps": 2, "global_batch_size": 8, **trained}
    assert said in refused(method={"name": "pretrain"}, model=model, train=rows)


@pytest.mark.parametrize(
    ("method", "arguments", "said"),
    [
        ("lora", [], "--train belongs to trained runs, and only to those"),
        ("none", [], "--model is missing: give store/models/KEY"),
        ("none", ["--model", "nowhere"], "nowhere holds no model (no config.json): run the fetch_model stage first"),
        ("lora", ["--model", "nowhere", "--train", "nothing"], "--train nothing has no summary.json: finish the train"),
    ],
)
def test_export(
    method: str, arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path, method={"name": method})
    assert export.main(["--config", config, *arguments, "--output", str(tmp_path / "out")]) == 1
    assert said in _last_line(capsys)
    assert not (tmp_path / "out").exists()


def test_what_the_data_and_the_model_hold_decides_whether_a_checkpoint_is_continued(tmp_path: Path) -> None:
    run = RunConfig.model_validate({"experiment": "e", "run": "r", "train": {"max_steps": 1}})
    args = argparse.Namespace(model=tmp_path / "model", tokens=tmp_path / "tokens", teacher=None)
    made = []
    for model, tokens in (("a", "b"), ("c", "b"), ("a", "d"), ("a", "b")):
        for path, content in ((args.model, model), (args.tokens, tokens)):
            path.mkdir(exist_ok=True)
            write_json(path / "manifest.json", {"files": {"file": content}, "provenance": len(made)})
        made.append(json.dumps(identity(run, args)))
    assert made[0] == made[3]
    assert len(set(made)) == 3
