"""Interrupted and resumed equals never interrupted: bit for bit on as many ranks, within 1e-5 on others."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import REPOSITORY, run_ranks
from tests.distributed.test_parity import job
from tests.tiny import write_rows

pytestmark = pytest.mark.distributed

# 20 packed rows, 8 rows a step: step 5 ends and step 6 begins in mid-epoch; local batch 2 on 2 ranks accumulates twice
CASE = ("llama", "full", "packed")
SETTINGS: dict[str, Any] = {"strategy": "fsdp2", "local_batch_size": 2}
LORA: dict[str, Any] = {**SETTINGS, "method_options": {"lora": {"rank": 4, "dropout": 0.2}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


def copy_of(run: dict[str, Any], folder: Path, name: str, keep_until: int, **more: Any) -> dict[str, Any]:
    """A resume job in a folder as it was when `run` had saved step `keep_until`."""
    target = folder / name
    shutil.copytree(run["folder"], target, dirs_exist_ok=True)
    for path in (target / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > keep_until:
            shutil.rmtree(path)
    return {**run, "name": name, "run": "resume", "folder": str(target), **more}


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    every = {"train": {"checkpoint": {"every": 1, "keep_last": 20}}}
    full = job("train", *CASE, folder, **SETTINGS, **every)
    lora = job("train", "qwen3", "lora", "padded", folder, **LORA, **every)
    ddp = job("train", "llama", "full", "padded", folder, strategy="ddp", dp_replicate=2, **every)
    workers = {"train": {"checkpoint": {"every": 1, "keep_last": 20}, "num_data_workers": 2}}
    loader = job("train", *CASE, folder, **SETTINGS, **workers)
    bad = job("bad_step", *CASE, folder, **SETTINGS)
    results = run_ranks(2, [full, lora, ddp, loader, bad], folder / "first")
    resumed = [
        copy_of(full, folder, "full-5", 5),
        copy_of(lora, folder, "lora-3", 3),
        copy_of(ddp, folder, "ddp-7", 7),
        copy_of(loader, folder, "loader-5", 5),
        copy_of(full, folder, "full-done", 10),
    ]
    results |= run_ranks(2, resumed, folder / "again")
    results |= run_ranks(1, [copy_of(full, folder, "full-5-on-1", 5)], folder / "on-1")
    results |= run_ranks(4, [copy_of(full, folder, "full-5-on-4", 5, local_batch_size=1)], folder / "on-4")
    return {"full": results[full["name"]], "lora": results[lora["name"]], "ddp": results[ddp["name"]],
            "loader": results[loader["name"]], "bad": results[bad["name"]], **results}  # fmt: skip


@pytest.mark.parametrize(("whole", "resumed", "step"), [
    ("full", "full-5", 5), ("lora", "lora-3", 3), ("ddp", "ddp-7", 7), ("loader", "loader-5", 5),
])  # fmt: skip
def test_resumed_equals_uninterrupted_bit_for_bit(
    runs: dict[str, dict[str, Any]], whole: str, resumed: str, step: int
) -> None:
    assert runs[resumed]["started_at"] == step
    assert runs[resumed]["steps"] == list(range(1, 11))
    assert runs[resumed]["losses"] == runs[whole]["losses"]
    for key, tensor in runs[whole]["weights"].items():
        assert torch.equal(runs[resumed]["weights"][key], tensor), key


@pytest.mark.parametrize("resumed", ["full-5-on-1", "full-5-on-4"])
def test_resumed_on_another_number_of_ranks(runs: dict[str, dict[str, Any]], resumed: str) -> None:
    assert runs[resumed]["started_at"] == 5
    torch.testing.assert_close(runs[resumed]["losses"], runs["full"]["losses"], rtol=1e-5, atol=0)
    for key, tensor in runs["full"]["weights"].items():
        torch.testing.assert_close(runs[resumed]["weights"][key], tensor, rtol=1e-4, atol=1e-5)


def test_a_finished_run_does_nothing_more(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["full-done"]["started_at"] == 10
    assert runs["full-done"]["losses"] == runs["full"]["losses"]


def test_a_step_that_is_not_finite_names_its_rows_and_changes_nothing(runs: dict[str, dict[str, Any]]) -> None:
    bad = runs["bad"]
    assert bad["type"] == "NonFiniteLoss"
    assert "step 1" in bad["error"]
    assert "source rows [" in bad["error"]
    assert bad["weights_unchanged"]


def test_killed_while_saving_falls_back_to_the_previous_checkpoint(
    folder: Path, runs: dict[str, dict[str, Any]]
) -> None:
    killed = job("train_until_killed_in_save", *CASE, folder, **SETTINGS)
    with pytest.raises(AssertionError, match="SIGKILL"):
        run_ranks(2, [killed], folder / "killed")
    left = sorted(p.name for p in (Path(killed["folder"]) / "checkpoints").glob("step_*"))
    assert left == ["step_4", "step_8.tmp"]
    result = run_ranks(2, [{**killed, "run": "resume"}], folder / "after-kill")[killed["name"]]
    assert result["started_at"] == 4
    assert result["losses"] == runs["full"]["losses"]
    assert sorted(p.name for p in (Path(killed["folder"]) / "checkpoints").glob("step_*")) == ["step_10", "step_8"]


@pytest.fixture
def stage(tmp_path: Path) -> dict[str, Any]:
    """Inputs of the real train stage: a config for two ranks that saves only when asked to."""
    from dayzero.config import RunConfig

    tokens = tmp_path / "tokens"
    write_rows(tokens / "train", packed=True, documents=400)
    (tokens / "manifest.json").write_text(json.dumps({"max_token_id": 127}))
    architecture = {"model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128,
                    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    run = RunConfig.model_validate(
        {
            "experiment": "e",
            "run": "r",
            "model": {"architecture": architecture},
            "method": {"name": "pretrain"},
            "parallelism": {"dp_shard": 2},
            "train": {"max_steps": 60, "global_batch_size": 16, "local_batch_size": 2, "precision": "fp32",
                      "optimizer": {"lr": 1e-3}, "checkpoint": {"every": 0}},
        }
    )  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(json.dumps(run.resolved()))
    return {"config": config, "tokens": tokens, "output": tmp_path / "train", "run": run, "log": tmp_path / "log.txt"}


def start(stage: dict[str, Any], *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dayzero.stages.train", "--config", str(stage["config"]), "--tokens",
         str(stage["tokens"]), "--output", str(stage["output"]), "--log", str(stage["log"]), *more],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "2"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def losses(stage: dict[str, Any]) -> list[float]:
    return [json.loads(line)["loss"] for line in (stage["output"] / "metrics.jsonl").read_text().splitlines()]


def stop_after(stage: dict[str, Any], steps: int, number: signal.Signals) -> int:
    """Start the stage, send `number` once `steps` steps are recorded, and return the step it stopped at."""
    process = start(stage)
    live = stage["output"] / "checkpoints" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (live.exists() and live.read_text().count("\n") >= steps):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "start the stage again to continue" in errors.splitlines()[-1]
    assert not (stage["output"] / "summary.json").exists()
    assert not (stage["output"] / "metrics.jsonl").exists()
    newest = max(int(p.name.removeprefix("step_")) for p in (stage["output"] / "checkpoints").glob("step_*"))
    assert steps <= newest < 60
    return newest


def test_the_stage_saves_when_asked_to_stop_and_continues(stage: dict[str, Any]) -> None:
    first = stop_after(stage, 3, signal.SIGTERM)
    second = stop_after(stage, first + 3, signal.SIGUSR1)
    for last in (second, None):
        process = start(stage)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        if last:
            assert f"step_{last}" in stage["log"].read_text().rpartition("continuing from")[2]
            resumed = losses(stage)
            shutil.rmtree(stage["output"])  # then once more, never interrupted
    assert len(resumed) == 60
    assert losses(stage) == resumed


def test_a_checkpoint_of_another_config_is_refused_with_the_differing_keys(stage: dict[str, Any]) -> None:
    short = stage["run"].model_dump(mode="json", exclude={"resources"})
    short["train"]["max_steps"] = 2
    stage["config"].write_text(json.dumps(short))
    process = start(stage)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    short["train"]["optimizer"]["lr"] = 5e-4
    short["train"]["local_batch_size"] = 8  # free to change: must not be named
    stage["config"].write_text(json.dumps(short))
    process = start(stage)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "train.optimizer.lr 0.001 -> 0.0005" in errors.splitlines()[-1]
    assert "local_batch_size" not in errors
    process = start(stage, "--set-aside-other-checkpoints")
    assert process.wait(timeout=120) == 0
    assert (stage["output"] / "checkpoints.superseded" / "step_2").is_dir()
