"""Interrupted and resumed equals never interrupted: bit for bit on as many ranks, within 1e-5 on others."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from dayzero.data.mixing import Mix

from tests.distributed.cases import job
from tests.distributed.launch import REPOSITORY, run_ranks
from tests.distributed.optimizers import HAS_TORCHAO
from tests.tiny import write_rows

pytestmark = pytest.mark.distributed

# 20 packed rows, 8 rows a step: step 5 ends and step 6 begins in mid-epoch; local batch 2 on 2 ranks accumulates twice
CASE = ("llama", "full", "packed")
SETTINGS: dict[str, Any] = {"strategy": "fsdp2", "local_batch_size": 2}
V_PIPELINE: dict[str, Any] = {"pp": 2, "pp_schedule": "zero_bubble"}
MIX: dict[str, Any] = {"rows": [14, 6], "weights": [0.7, 0.3]}  # the 20 rows as those of two sources
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "bfloat16-moments": {"state_dtype": "bfloat16"},
    "muon": {"name": "muon"},  # its iteration in bfloat16 takes rounding for more: not compared across ranks
    "adafactor": {"name": "adafactor", "lr": 1e-2},
    **({"adamw8bit": {"name": "adamw8bit"}} if HAS_TORCHAO else {}),
}
LONGEST = 400
"""Seconds that a training of a minute may take where others keep the machine busy."""

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
    def saved_every(steps: int, asynchronous: bool = True, **train: Any) -> dict[str, Any]:
        checkpoint = {"every": steps, "keep_last": 20, "asynchronous": asynchronous}
        return {"train": {"checkpoint": checkpoint, "ema": {"decay": 0.8}, **train}}

    every = saved_every(5)
    plain = {**SETTINGS, "method_options": {"lora": {"rank": 3}}}  # on 4 ranks one has no row of some matrices
    full = job("train", *CASE, folder, **SETTINGS, **saved_every(1))
    lora = job("train", "qwen3", "lora", "padded", folder, **LORA, **saved_every(3))
    ddp = job("train", "llama", "full", "padded", folder, strategy="ddp", dp_replicate=2, **saved_every(7))
    loader = job("train", *CASE, folder, **SETTINGS, **saved_every(5, num_data_workers=2))
    late = job("train_with_late_writes", *CASE, folder, **SETTINGS, **saved_every(3))
    sync = job("train", *CASE, folder, **SETTINGS, **saved_every(5, asynchronous=False))
    plain_lora = job("train", "qwen3", "lora", "padded", folder, **plain, **every)
    tp = job("train", *CASE, folder, **SETTINGS, tp=2, **every)
    tp_lora = job("train", "qwen3", "lora", "padded", folder, **plain, tp=2, **every)
    named = {"full": full, "lora": lora, "ddp": ddp, "loader": loader, "late": late, "sync": sync, "tp": tp,
             "plain-lora": plain_lora, "tp-lora": tp_lora}  # fmt: skip
    named["moe"] = moe = job("train", "mixtral", "full", "packed", folder, **SETTINGS, ep=2, **every)
    named["mixed"] = mixed = job("train", *CASE, folder, **SETTINGS, mix=MIX, **every)
    for name, options in OPTIMIZERS.items():
        trained = saved_every(5, optimizer={"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-6, **options})
        named[name] = job("train", "qwen3", "full", "packed", folder, **SETTINGS, **trained, optimizer=name)
    named["unused"] = job("train", "big_bird", "full", "padded", folder, **SETTINGS, **every)
    named["bad"] = job("bad_step", *CASE, folder, **SETTINGS)
    named["pipeline"] = pipeline = job("train", *CASE, folder, **SETTINGS, **V_PIPELINE, **every)
    named["tied-lora"] = tied_lora = job("train", "llama", "lora", "padded", folder, **plain, **every)
    named["tied-lora-pipeline"] = job("train", "llama", "lora", "padded", folder, **plain, pp=2, **every)
    named["bad-pipeline"] = job("bad_step", *CASE, folder, **SETTINGS, pp=2)
    for fails in ("write", "rename"):
        named[fails] = job("failing_save", *CASE, folder, **SETTINGS, fails=fails)
    results = run_ranks(2, list(named.values()), folder / "first")

    often = saved_every(3)
    named["four"] = job("train", *CASE, folder, strategy="fsdp2", local_batch_size=1, **often)
    named["four-lora"] = job("train", "qwen3", "lora", "padded", folder, **{**plain, "local_batch_size": 1}, **often)
    on_4 = [copy_of(full, folder, "full-5-on-4", 5, local_batch_size=1), named["four"], named["four-lora"]]
    on_4.append(copy_of(moe, folder, "moe-5-on-4", 5, local_batch_size=1))
    results |= run_ranks(4, on_4, folder / "on-4")

    replicas = {"strategy": "ddp", "dp_replicate": 2}
    on_2 = [
        copy_of(full, folder, "full-5", 5),
        copy_of(lora, folder, "lora-3", 3),
        copy_of(ddp, folder, "ddp-7", 7),
        copy_of(loader, folder, "loader-5", 5),
        copy_of(late, folder, "late-6", 6, **every),
        copy_of(sync, folder, "sync-5", 5),
        copy_of(mixed, folder, "mixed-5", 5),
        copy_of(named["unused"], folder, "unused-5", 5),
        copy_of(full, folder, "full-done", 10),
        copy_of(full, folder, "full-5-without-moments", 5, lose_moments=True),
        copy_of(full, folder, "full-5-on-tp", 5, tp=2),
        copy_of(pipeline, folder, "pipeline-5", 5),
        copy_of(pipeline, folder, "pipeline-5-on-fsdp2", 5, pp=1, pp_schedule="1f1b"),
        copy_of(pipeline, folder, "pipeline-5-on-1f1b", 5, pp_schedule="1f1b"),
        copy_of(full, folder, "full-5-on-pipeline", 5, **V_PIPELINE),
        copy_of(plain_lora, folder, "plain-lora-5-on-tp", 5, tp=2),
        copy_of(tied_lora, folder, "tied-lora-5-on-pipeline", 5, pp=2),
        copy_of(named["tied-lora-pipeline"], folder, "tied-lora-pipeline-5-on-fsdp2", 5, pp=1),
        copy_of(tp, folder, "tp-5-on-fsdp2", 5, tp=1),
        copy_of(tp_lora, folder, "tp-lora-5-on-fsdp2", 5, tp=1),
        copy_of(full, folder, "full-5-on-ddp", 5, **replicas),
        copy_of(plain_lora, folder, "plain-lora-5-on-ddp", 5, **replicas),
        copy_of(named["four"], folder, "four-3-on-2", 3),
        copy_of(named["four-lora"], folder, "four-lora-3-on-2", 3),
        *(copy_of(named[name], folder, f"{name}-5", 5) for name in OPTIMIZERS),
    ]
    results |= run_ranks(2, on_2, folder / "again")
    then = {run["name"]: run for run in on_2}
    on_1 = [
        copy_of(full, folder, "full-5-on-1", 5),
        copy_of(mixed, folder, "mixed-5-on-1", 5),
        copy_of(moe, folder, "moe-5-on-1", 5, ep=1),
        *(copy_of(named[name], folder, f"{name}-5-on-1", 5) for name in OPTIMIZERS if name != "muon"),
        copy_of(then["four-3-on-2"], folder, "four-6-on-2-on-1", 6),
        copy_of(then["four-lora-3-on-2"], folder, "four-lora-6-on-2-on-1", 6),
    ]
    results |= run_ranks(1, on_1, folder / "on-1")
    return results | {short: results[run["name"]] for short, run in named.items()}


@pytest.mark.parametrize(("whole", "resumed", "step"), [
    ("full", "full-5", 5), ("lora", "lora-3", 3), ("ddp", "ddp-7", 7), ("loader", "loader-5", 5), ("late", "late-6", 6),
    ("sync", "sync-5", 5), ("full", "late-6", 6), ("pipeline", "pipeline-5", 5), ("mixed", "mixed-5", 5),
    ("unused", "unused-5", 5), *((name, f"{name}-5", 5) for name in OPTIMIZERS),
])  # fmt: skip
def test_resumed_equals_uninterrupted_bit_for_bit(
    runs: dict[str, dict[str, Any]], whole: str, resumed: str, step: int
) -> None:
    """`late`: each checkpoint is written after the weights have changed, so it must have been copied before."""
    assert runs[resumed]["started_at"] == step
    assert runs[resumed]["steps"] == list(range(1, 11))
    assert runs[resumed]["losses"] == runs[whole]["losses"]
    for key, tensor in runs[whole]["weights"].items():
        assert torch.equal(runs[resumed]["weights"][key], tensor), key
    assert runs[whole]["averages"]
    for key, tensor in runs[whole]["averages"].items():
        assert torch.equal(runs[resumed]["averages"][key], tensor), key


@pytest.mark.parametrize(("whole", "resumed", "step"), [
    ("full", "full-5-on-1", 5), ("full", "full-5-on-4", 5), ("full", "full-5-on-tp", 5), ("full", "full-5-on-ddp", 5),
    ("plain-lora", "plain-lora-5-on-tp", 5), ("plain-lora", "plain-lora-5-on-ddp", 5), ("tp", "tp-5-on-fsdp2", 5),
    ("tp-lora", "tp-lora-5-on-fsdp2", 5), ("four", "four-3-on-2", 3), ("four-lora", "four-lora-3-on-2", 3),
    ("four", "four-6-on-2-on-1", 6), ("four-lora", "four-lora-6-on-2-on-1", 6), ("full", "full-5-on-pipeline", 5),
    ("pipeline", "pipeline-5-on-fsdp2", 5), ("pipeline", "pipeline-5-on-1f1b", 5),
    ("tied-lora", "tied-lora-5-on-pipeline", 5), ("tied-lora-pipeline", "tied-lora-pipeline-5-on-fsdp2", 5),
    ("moe", "moe-5-on-1", 5), ("moe", "moe-5-on-4", 5), ("mixed", "mixed-5-on-1", 5),
    *((name, f"{name}-5-on-1", 5) for name in OPTIMIZERS if name != "muon"),
])  # fmt: skip
def test_resumed_on_another_mesh(runs: dict[str, dict[str, Any]], whole: str, resumed: str, step: int) -> None:
    assert runs[resumed]["started_at"] == step
    torch.testing.assert_close(runs[resumed]["losses"], runs[whole]["losses"], rtol=1e-5, atol=0)
    for key, tensor in runs[whole]["weights"].items():
        torch.testing.assert_close(runs[resumed]["weights"][key], tensor, rtol=1e-4, atol=1e-5)
    for key, tensor in runs[whole]["averages"].items():
        torch.testing.assert_close(runs[resumed]["averages"][key], tensor, rtol=1e-4, atol=1e-5)
    assert runs[resumed]["spread"] == 0.0


def test_a_mix_goes_on_with_its_schedule(runs: dict[str, dict[str, Any]]) -> None:
    """What the trainer was given, step by step, is the schedule of a mix that nobody interrupted."""
    mix = Mix(MIX["rows"], MIX["weights"], ["a", "b"])
    rows = [mix.rows(np.arange(8 * step, 8 * step + 8), 3).tolist() for step in range(10)]
    assert sum(row >= 14 for step in rows for row in step) == 24  # 30 % of 80
    expected = {step: sorted(2 * row + i for row in drawn for i in (0, 1)) for step, drawn in enumerate(rows, 1)}
    assert runs["mixed"]["drawn"] == expected
    for resumed in ("mixed-5", "mixed-5-on-1"):
        assert runs[resumed]["drawn"] == {step: expected[step] for step in range(6, 11)}
    assert runs["mixed"]["losses"] != runs["full"]["losses"]


def test_lost_moments_would_be_seen(runs: dict[str, dict[str, Any]]) -> None:
    """The optimizer's state is what makes the curves above agree."""
    lost, whole = (torch.tensor(runs[name]["losses"][5:]) for name in ("full-5-without-moments", "full"))
    assert ((lost - whole).abs() / whole).max() > 1e-3


@pytest.mark.parametrize(("fails", "rank"), [("write", "rank 1: "), ("rename", "")])
def test_a_checkpoint_that_cannot_be_written_is_one_line_on_every_rank(
    runs: dict[str, dict[str, Any]], fails: str, rank: str
) -> None:
    (said, step), *others = runs[fails]["raised"]
    assert others == [[said, step]]
    assert 4 <= step <= 8  # at the next step boundary, at the latest when the next checkpoint is due
    assert said.startswith(
        f"CheckpointFailed: the checkpoint of step 4 is not written: {rank}no space left on the disk"
    )
    assert "step_4" in said
    assert said.endswith(": free some, or set results_dir to a larger disk")
    assert runs[fails]["left"] == []


def test_the_wait_for_a_checkpoint_stands_in_the_record_of_the_next_step(runs: dict[str, dict[str, Any]]) -> None:
    waited = [seconds > 0 for seconds in runs["late"]["checkpoint_seconds"]]
    assert waited == [step - 1 in (3, 6, 9) for step in range(1, 11)]


def test_a_finished_run_does_nothing_more(runs: dict[str, dict[str, Any]]) -> None:
    assert runs["full-done"]["started_at"] == 10
    assert runs["full-done"]["losses"] == runs["full"]["losses"]


@pytest.mark.parametrize("run", ["bad", "bad-pipeline"])
def test_a_step_that_is_not_finite_names_its_rows_and_changes_nothing(
    runs: dict[str, dict[str, Any]], run: str
) -> None:
    bad = runs[run]
    assert bad["type"] == "NonFiniteLoss"
    assert "step 1" in bad["error"]
    assert "source rows [" in bad["error"]
    assert bad["weights_unchanged"]
    assert bad["validation_error"].startswith("validation loss ")


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


STOPPED: dict[str, dict[str, Any]] = {
    "in-a-step": {**SETTINGS, "stop_in": 6},
    "in-a-saved-step": {**SETTINGS, "stop_in": 5},
    "pipeline": {**SETTINGS, **V_PIPELINE, "stop_in": 6},
    "tp": {**SETTINGS, "tp": 2, "stop_in": 6},
}


def test_a_stop_saves_the_step_that_it_comes_in_and_starts_no_other(tmp_path: Path) -> None:
    """One rank alone is asked; no step is trained after that, and what follows is bit for bit as if nobody had."""
    train = {"checkpoint": {"every": 5, "keep_last": 20}, "ema": {"decay": 0.8}, "num_data_workers": 2}
    stopped = {
        name: job("stopped_in_step", *CASE, tmp_path, **options, train=train) for name, options in STOPPED.items()
    }
    whole = {name: job("train", *CASE, tmp_path, **options, train=train) for name, options in STOPPED.items()}
    early = job("stopped_in_step", *CASE, tmp_path, **SETTINGS, stop_in=0, train=train)
    runs = run_ranks(2, [*stopped.values(), *whole.values(), early], tmp_path / "first")
    assert runs[early["name"]] == {"said": [[True, 0, []]] * 2, "steps": []}
    for run in stopped.values():
        step = run["stop_in"]
        saved = ["step_5"] if step == 5 else ["step_5", f"step_{step}"]
        assert runs[run["name"]] == {"said": [[True, step, saved]] * 2, "steps": list(range(1, step + 1))}
    resumed = run_ranks(2, [{**run, "run": "resume"} for run in stopped.values()], tmp_path / "again")
    for name, run in stopped.items():
        found, expected = resumed[run["name"]], runs[whole[name]["name"]]
        assert found["started_at"] == run["stop_in"]
        assert found["losses"] == expected["losses"]
        for part in ("weights", "averages"):
            for key, tensor in expected[part].items():
                assert torch.equal(found[part][key], tensor), (name, key)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Inputs of the real train stage: a config for two ranks that saves only when asked to. Ends what a test left."""
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
            "train": {"max_steps": 40, "global_batch_size": 16, "local_batch_size": 2, "precision": "fp32",
                      "optimizer": {"lr": 1e-3}, "checkpoint": {"every": 0}},
        }
    )  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(json.dumps(run.resolved()))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    files = {"config": config, "tokens": tokens, "output": tmp_path / "train", "log": tmp_path / "log.txt"}
    yield {**files, "run": run, "temporary": temporary}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if str(config) in process.cmdline():
                process.kill()


def start(stage: dict[str, Any], *more: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dayzero.stages.train", "--config", str(stage["config"]), "--tokens",
         str(stage["tokens"]), "--output", str(stage["output"]), "--log", str(stage["log"]), *more],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "2", "TMPDIR": str(stage["temporary"]), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def losses(stage: dict[str, Any]) -> list[float]:
    return [json.loads(line)["loss"] for line in (stage["output"] / "metrics.jsonl").read_text().splitlines()]


def training(stage: dict[str, Any], steps: int) -> subprocess.Popen[str]:
    """Start the stage and return once `steps` steps are recorded."""
    process = start(stage)
    live = stage["output"] / "checkpoints" / "metrics.jsonl"
    deadline = time.monotonic() + LONGEST
    while not (live.exists() and live.read_text().count("\n") >= steps):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks, and what they started."""
    found = psutil.Process(process.pid).children(recursive=True)
    assert len(found) >= 2
    return found


def stop_after(stage: dict[str, Any], steps: int, number: signal.Signals) -> int:
    """Start the stage, send `number` once `steps` steps are recorded, and return the step it stopped at."""
    process = training(stage, steps)
    process.send_signal(number)
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 75, errors
    assert "start the stage again to continue" in errors.splitlines()[-1]
    assert not (stage["output"] / "summary.json").exists()
    assert not (stage["output"] / "metrics.jsonl").exists()
    newest = max(int(p.name.removeprefix("step_")) for p in (stage["output"] / "checkpoints").glob("step_*"))
    assert steps <= newest < 40
    return newest


def test_the_stage_saves_when_asked_to_stop_and_continues(stage: dict[str, Any]) -> None:
    first = stop_after(stage, 3, signal.SIGTERM)
    second = stop_after(stage, first + 3, signal.SIGUSR1)
    for last in (second, None):
        process = start(stage)
        _, errors = process.communicate(timeout=LONGEST)
        assert process.returncode == 0, errors
        if last:
            assert f"step_{last}" in stage["log"].read_text().rpartition("continuing from")[2]
            resumed = losses(stage)
            shutil.rmtree(stage["output"])  # then once more, never interrupted
    assert len(resumed) == 40
    assert losses(stage) == resumed
    assert not list(stage["temporary"].iterdir())  # as torchrun would leave there, once a training


def test_an_error_before_the_ranks_have_met_is_the_last_line(stage: dict[str, Any]) -> None:
    process = start(stage, GLOO_SOCKET_IFNAME="nosuch7")
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 1
    assert re.match(r"train: error: rank [01]: RuntimeError: .*nosuch7", errors.splitlines()[-1]), errors


def test_ranks_end_with_the_process_that_started_them(stage: dict[str, Any]) -> None:
    process = training(stage, 3)
    ranks = ranks_of(process)
    process.kill()
    assert not psutil.wait_procs(ranks, timeout=LONGEST)[1]


def test_a_killed_rank_is_said_by_the_others(stage: dict[str, Any]) -> None:
    process = training(stage, 3)
    next(rank for rank in ranks_of(process) if rank.ppid() == process.pid).kill()
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 1
    assert re.search(r"rank [01] was killed by SIGKILL \(often the system's answer to too little memory", errors)


def test_a_second_interrupt_ends_training_at_once(stage: dict[str, Any]) -> None:
    process = training(stage, 3)
    ranks = ranks_of(process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode in (75, 130), errors  # 75: it had stopped by the first
    assert not psutil.wait_procs(ranks, timeout=LONGEST)[1]
    assert not (stage["output"] / "lock.json").exists()


def test_a_checkpoint_of_another_config_is_refused_with_the_differing_keys(stage: dict[str, Any]) -> None:
    short = stage["run"].model_dump(mode="json", exclude={"resources"})
    short["train"]["max_steps"] = 2
    stage["config"].write_text(json.dumps(short))
    process = start(stage)
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 0, errors
    first = losses(stage)
    short["train"]["optimizer"]["lr"] = 5e-4
    short["train"]["local_batch_size"] = 8  # free to change: must not be named
    stage["config"].write_text(json.dumps(short))
    process = start(stage)
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 1
    assert "train.optimizer.lr 0.001 -> 0.0005" in errors.splitlines()[-1]
    assert "local_batch_size" not in errors
    process = start(stage, "--set-aside-other-checkpoints")
    assert process.wait(timeout=LONGEST) == 0
    assert (stage["output"] / "checkpoints.superseded" / "step_2").is_dir()
    assert losses(stage) != first
    short["train"]["optimizer"]["lr"] = 1e-3  # and back: what was trained is still there
    stage["config"].write_text(json.dumps(short))
    process = start(stage, "--set-aside-other-checkpoints")
    _, errors = process.communicate(timeout=LONGEST)
    assert process.returncode == 0
    assert "taking back this config's checkpoints" in errors
    assert losses(stage) == first
    assert len((stage["output"] / "attempts.jsonl").read_text().splitlines()) == 4  # the first start's and this one's


def test_a_world_size_that_torchrun_did_not_give_is_refused_on_all_ranks(stage: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m",
         "dayzero.stages.train", "--config", str(stage["config"]), "--tokens", str(stage["tokens"]), "--output",
         str(stage["output"])],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=LONGEST,
    )  # fmt: skip
    assert done.returncode == 1
    said = {line for line in done.stderr.splitlines() if line.startswith("train: ")}
    assert said == {
        "train: error: parallelism: dp_replicate 1 x dp_shard 2 x cp 1 x tp 1 = 2, but the world size is 3: "
        "start 2 processes, or change the sizes so that their product is 3"
    }
    assert "SizeError" not in done.stderr  # torchrun shows a traceback of its own, the ranks show none
    assert not stage["output"].exists()
