"""Every stage for real on a tiny model: untouched, LoRA on FSDP2 x TP, full on PP x FSDP2, and pretraining in one
process with a tokenizer of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from dayzero.files import read_json
from dayzero.serving.parity import _transformers, choose_prompts, judge

from tests.exported import tiny_export
from tests.workflow.project import Project, make_project

pytestmark = [pytest.mark.workflow, pytest.mark.end_to_end, pytest.mark.timeout(1800)]

EXPERIMENT = """
description: every stage on a tiny model
defaults:
  model.source: local/llama
  data: {source: local/rows.jsonl, format: text, validation_size: 8, test_size: 8}
  tokenize: {seq_len: 64}
  train:
    max_steps: 6
    global_batch_size: 8
    local_batch_size: 2
    precision: fp32
    optimizer.lr: 5.0e-3
    validate_every: 3
    checkpoint.every: 3
  evaluate: {tasks: [text_perplexity], batch_size: 8}
  serving: {num_prompts: 4, max_new_tokens: 8}
  resources:
    tokenize.threads: 1
    export.threads: 1
    evaluate.threads: 1
    verify_serving.threads: 1
runs:
  base: {method.name: none}
  lora: {parallelism: {dp_shard: 2, tp: 2}, method.lora.rank: 4}
  full: {method.name: full, parallelism: {pp: 2, dp_shard: 2}}
  pretrain:
    method.name: pretrain
    model:
      source: null
      architecture: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
                     num_attention_heads: 2, num_key_value_heads: 1, head_dim: 32, max_position_embeddings: 128}
      tokenizer.vocab_size: 320
    parallelism.strategy: none
"""

WAYS = (
    EXPERIMENT.partition("runs:")[0]
    + """
runs:
  dora:
    method.lora: {rank: 4, dora: true, rslora: true, targets: '.*layers.1[.].*_proj', modules_to_save: [embed_tokens]}
    train.ema.decay: 0.5
    export.weights: ema
    parallelism.dp_shard: 2
  kd:
    method: {name: kd, kd: {teacher: dora, temperature: 2.0, weight: 0.5}, freeze: ["*embed_tokens*"]}
    train: {ema.decay: 0.5, z_loss: 1.0e-3}
    export.weights: ema
    parallelism.strategy: none
"""
)


def snakemake(project: Project, experiment: str, *targets: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--cores",
        "2",
        "--config",
        f"experiment={experiment}",
        "--",
        *targets,
    ]
    finished = subprocess.run(
        command, cwd=project.path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert finished.returncode == 0, finished.stdout[-8000:]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The experiment, finished."""
    project = make_project(tmp_path_factory.mktemp("end"), EXPERIMENT)
    tiny_export(project.path / "local/llama", num_key_value_heads=2, tie_word_embeddings=True)
    rows = [
        {"text": f"Row {i}: the answer to {i} + {i + 1} is {2 * i + 1}, and the fox jumps {i} times."}
        for i in range(80)
    ]
    (project.path / "local/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    snakemake(project, "tiny")
    return project


def test_other_ways_to_train_are_exported_too(done: Project) -> None:
    """A run that learns from another's export waits for it; averages and whole modules reach the exported model."""
    from safetensors.torch import load_file

    (done.path / "config/experiments/ways.yaml").write_text(WAYS)
    runs = ("dora", "kd")
    snakemake(done, "ways", *(f"results/ways/{run}/model/manifest.json" for run in runs))
    base = load_file(done.path / "local/llama/model.safetensors")
    moved = {}
    for run in runs:
        folder = done.path / f"results/ways/{run}"
        assert read_json(folder / "model/manifest.json")["reload"]["training"]["difference"] <= 1e-5
        losses = [json.loads(line)["loss"] for line in (folder / "train/metrics.jsonl").read_text().splitlines()]
        assert losses[-1] < losses[0], run
        weights = load_file(folder / "model/model.safetensors")
        moved[run] = {name for name, tensor in weights.items() if not tensor.equal(base[name])}
    assert "model.embed_tokens.weight" in moved["dora"]
    assert any(".layers.1." in name for name in moved["dora"])
    assert not any(".layers.0." in name for name in moved["dora"])
    assert "model.norm.weight" in moved["kd"]
    assert "model.embed_tokens.weight" not in moved["kd"]
    assert "kl" in json.loads((done.path / "results/ways/kd/train/metrics.jsonl").read_text().splitlines()[0])
    assert "kd" in (done.path / "results/ways/kd/model/README.md").read_text()


def test_every_run_has_its_row(done: Project) -> None:
    scores = pd.read_csv(done.path / "results/tiny/report/results.csv")
    assert set(scores["run"]) == {"base", "lora", "full", "pretrain"}
    value = scores[scores["metric"] == "bits_per_byte"].set_index("run")["value"]
    assert value["lora"] < value["base"]  # six steps help a random model
    assert value["full"] < value["base"]
    page = (done.path / "results/tiny/report/index.html").read_text()
    assert all(text in page for text in ("base", "lora", "full", "pretrain", "text_perplexity", "<svg"))


def test_training_went_down_and_left_a_checkpoint(done: Project) -> None:
    for run, ranks in {"lora": 4, "full": 4, "pretrain": 1}.items():
        folder = done.path / f"results/tiny/{run}/train"
        losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        summary = read_json(folder / "summary.json")
        assert len(losses) == 6
        assert losses[-1] < losses[0]
        assert (summary["loss"], summary["world_size"]) == (losses[-1], ranks)
        assert (folder / summary["checkpoint"]).is_dir()


def test_a_mesh_gives_the_curve_of_one_process(done: Project, tmp_path: Path) -> None:
    for run in ("lora", "full"):
        config = read_json(done.path / f"results/tiny/{run}/config.json")
        config["parallelism"] = {"strategy": "none"}
        used = read_json(done.path / f"results/tiny/{run}/train/summary.json")["provenance"]["identity"]
        model = done.path / "results/store/models" / used["model"]["store"]
        tokens = done.path / "results/store/tokens" / used["tokens"]["store"]
        command = [sys.executable, "-m", "dayzero.stages.train", "--config", json.dumps(config)]
        command += ["--model", str(model), "--tokens", str(tokens), "--output", str(tmp_path / run)]
        finished = subprocess.run(command, cwd=done.path, text=True, capture_output=True)
        assert finished.returncode == 0, finished.stderr
        found, want = (
            [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            for folder in (done.path / f"results/tiny/{run}/train", tmp_path / run)
        )
        for key in ("loss", "grad_norm"):
            assert [r[key] for r in found] == pytest.approx([r[key] for r in want], rel=1e-4), (run, key)


def test_served_models_agree(done: Project) -> None:
    for run in ("base", "lora", "full", "pretrain"):
        parity = read_json(done.path / f"results/tiny/{run}/serve/parity.json")
        assert (parity["verdict"], parity["num_prompts"], parity["tokens_compared"]) == ("pass", 4, 32), run
        assert parity["token_mismatches"] == 0, run
        assert parity["max_logprob_difference"] < 1e-4, run
        assert parity["max_token_logprob_difference"] < 1e-4, run


def test_what_vllm_answered_is_not_what_other_weights_answer(done: Project, tmp_path: Path) -> None:
    """Against weights that are a little off the same answers fail, against the model's own they pass."""
    from transformers import LlamaForCausalLM

    model = done.path / "results/tiny/base/model"
    other = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.05)
    other.save_pretrained(tmp_path / "other")
    parity = read_json(done.path / "results/tiny/base/serve/parity.json")
    used = read_json(done.path / "results/tiny/lora/train/summary.json")["provenance"]["identity"]["tokens"]["store"]
    prompts = choose_prompts(done.path / "results/store/tokens" / used, 4, 256)
    answers = [prompt["tokens"] for prompt in parity["prompts"]]
    own, changed = (_transformers(path, prompts, answers, "float32", False) for path in (model, tmp_path / "other"))
    served = [{**record, "tokens": answer} for record, answer in zip(own, answers, strict=True)]
    assert judge(prompts, served, own, 1e-3)["verdict"] == "pass"
    assert judge(prompts, served, changed, 1e-3)["verdict"] == "fail"


def test_exported_models_load(done: Project) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for run in ("base", "lora", "full", "pretrain"):
        folder = done.path / f"results/tiny/{run}/model"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) <= model.config.vocab_size
        assert (folder / "README.md").is_file()


def test_everything_carries_its_provenance_and_its_log(done: Project) -> None:
    written = [
        path
        for pattern in (
            "store/*/*/manifest.json",
            "tiny/*/train/summary.json",
            "tiny/*/model/manifest.json",
            "tiny/*/eval/results.json",
            "tiny/*/serve/parity.json",
        )
        for path in (done.path / "results").glob(pattern)
    ]
    assert (
        len(written) == 6 + 3 + 4 * 3
    )  # data and its check, model, tokenizer, two of tokens; three trained of four runs
    for path in written:
        assert read_json(path)["provenance"]["packages"], path
    for stage in ("train", "export", "evaluate", "verify_serving"):
        assert (done.path / f"results/tiny/lora/logs/{stage}.log").stat().st_size


def test_nothing_is_left_to_do(done: Project) -> None:
    assert done.planned() == set()


def test_a_stage_alone_from_the_shell(done: Project, tmp_path: Path) -> None:
    """With the run's config.json, as a person would start it."""
    command = [sys.executable, "-m", "dayzero.stages.export", "--config", "results/tiny/base/config.json"]
    command += ["--model", str(done.store("models").relative_to(done.path)), "--output", str(tmp_path / "model")]
    finished = subprocess.run(command, cwd=done.path, text=True, capture_output=True)
    assert finished.returncode == 0, finished.stderr
    of_workflow = read_json(done.path / "results/tiny/base/model/manifest.json")
    assert read_json(tmp_path / "model/manifest.json")["files"] == of_workflow["files"]
