"""Checkpoints in one process: what is copied, kept, refused, and left when the disk is full."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dayzero.checkpoint_files import checkpoints
from dayzero.config import Checkpoint, Lora, Method, Train
from dayzero.engine import checkpoint_writer
from dayzero.engine.checkpoint import best_checkpoint, check_identity, load_checkpoint, set_aside, state_of, take_back
from dayzero.engine.checkpoint_writer import CheckpointFailed, CheckpointWriter
from dayzero.engine.gathering import whole_weights
from dayzero.engine.model import ModelSource
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallel_model import ParallelModel
from dayzero.errors import ConfigError, DataError
from torch import nn

from tests.tiny import ARCHITECTURES


class Training:
    """A small model with AdamW, and its writer."""

    def __init__(self, folder: Path, width: int = 8, **config: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.writer = CheckpointWriter(folder, Checkpoint(**config))

    def step(self) -> None:
        self.model(torch.randn(4, 8)).pow(2).mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int, losses: dict[int, float] | None = None) -> None:
        self.writer.save(
            step, state_of(self.model, self.optimizer), {"validation_losses": losses or {}, "identity": {"seed": 1}}
        )

    def values(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in state_of(self.model, self.optimizer).items()}


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before this event."""
    event, real = threading.Event(), checkpoint_writer.dcp.save

    def save(*args: Any, **options: Any) -> None:
        assert event.wait(60)
        real(*args, **options)

    monkeypatch.setattr(checkpoint_writer.dcp, "save", save)
    yield event
    event.set()


def test_weights_may_change_while_they_are_written(tmp_path: Path, held: threading.Event) -> None:
    training = Training(tmp_path)
    training.step()
    before = training.values()
    training.save(1)
    training.step()
    assert checkpoints(tmp_path) == []
    held.set()
    training.writer.wait()
    assert not torch.equal(training.values()["model.0.weight"], before["model.0.weight"])
    again = Training(tmp_path)
    load_checkpoint(tmp_path / "step_1", again.model, again.optimizer)
    assert again.values().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.values().items())


def test_one_checkpoint_at_a_time_and_none_left_behind(tmp_path: Path, held: threading.Event) -> None:
    training = Training(tmp_path, keep_last=5)
    training.step()
    with training.writer:
        training.save(1)
        threading.Timer(0.2, held.set).start()
        training.save(2)  # waits for step 1
        assert [p.name for p in checkpoints(tmp_path)] in (["step_1"], ["step_1", "step_2"])
    assert [p.name for p in checkpoints(tmp_path)] == ["step_1", "step_2"]


def test_an_error_in_training_goes_on_once_the_checkpoint_is_written(tmp_path: Path, held: threading.Event) -> None:
    training = Training(tmp_path)
    training.step()

    def fail() -> None:
        with training.writer:
            training.save(1)
            threading.Timer(0.2, held.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [p.name for p in checkpoints(tmp_path)] == ["step_1"]


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    training = Training(tmp_path, keep_last=2, keep_best=2)
    training.step()
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0, 6: 4.0, 7: 5.0}  # no validation at step 5
    kept = []
    for step in range(1, 8):
        training.save(step, {s: loss for s, loss in losses.items() if s <= step})
        training.writer.wait()
        kept.append("".join(p.name.removeprefix("step_") for p in checkpoints(tmp_path)))
    assert kept == ["1", "12", "23", "234", "2345", "2356", "2367"]
    assert best_checkpoint(tmp_path, losses) == tmp_path / "step_2"
    assert best_checkpoint(tmp_path, {}) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_2", "step_3", "step_6", "step_7"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_one_line_and_leaves_the_earlier_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small disk: {made.stderr.strip()}")
    try:
        training = Training(tmp_path, width=8000, asynchronous=asynchronous)  # 1.6 MB a checkpoint
        training.step()
        training.save(1)
        training.writer.wait()
        with pytest.raises(CheckpointFailed) as failed, training.writer:
            training.save(2)
        left = sorted(p.name for p in tmp_path.iterdir())
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
    assert re.fullmatch(
        rf"the checkpoint of step 2 is not written: .*no space left on the disk of {tmp_path}/step_2\S*: "
        r"free some, or set results_dir to a larger disk",
        str(failed.value),
    )
    assert left == ["step_1"]
    training.writer.wait()  # said once


def test_a_checkpoint_of_another_shape_is_one_line(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step()
    training.save(1)
    training.writer.wait()
    other = Training(tmp_path, width=9)
    before = other.values()
    with pytest.raises(ConfigError) as refused:
        load_checkpoint(tmp_path / "step_1", other.model, other.optimizer)
    said = str(refused.value)
    assert said.startswith(f"{tmp_path}/step_1 is a checkpoint of another model, with model.0.weight [8, 8] where the ")
    assert "model has [9, 8]; model.0.bias [8] where the model has [9]; " in said
    assert said.endswith(f" and 6 more: continue it with its own model, or remove {tmp_path} to train afresh")
    assert all(torch.equal(other.values()[name], tensor) for name, tensor in before.items())
    for model, says in (
        (
            nn.Sequential(*training.model, nn.Linear(8, 8)),
            "with no model.2.weight; no model.2.bias: continue it with its",
        ),
        (
            training.model[:1],
            "with model.1.weight that the model has not; model.1.bias that the model has not; optimizer.",
        ),
    ):
        with pytest.raises(ConfigError, match=re.escape(says)):
            load_checkpoint(tmp_path / "step_1", model, torch.optim.AdamW(model.parameters()))


def test_a_parameter_without_gradients_has_no_moments(tmp_path: Path) -> None:
    """Some models have parameters that no forward pass reaches; they must not stop a run from being continued."""
    training = Training(tmp_path)
    for parameter in training.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    training.model[1].bias.grad = None
    training.optimizer.step()
    training.save(1)
    training.writer.wait()
    again = Training(tmp_path)
    load_checkpoint(tmp_path / "step_1", again.model, again.optimizer)
    assert again.values().keys() == training.values().keys()
    assert "optimizer.1.bias.step" not in again.values()


def spoil(path: Path, how: str) -> None:
    data, trainer = path / "__0_0.distcp", path / "trainer.json"
    if how == "truncated":
        data.write_bytes(data.read_bytes()[:-1])
    elif how == "missing":
        data.unlink()
    elif how == "no metadata":
        (path / ".metadata").unlink()
    elif how == "empty metadata":
        (path / ".metadata").write_bytes(b"")
    elif how == "no identity":
        trainer.write_text(json.dumps({k: v for k, v in json.loads(trainer.read_text()).items() if k != "identity"}))
    else:
        trainer.write_text("")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"__0_0.distcp has \d+ bytes of \d+"),
        ("missing", "__0_0.distcp is missing"),
        ("no metadata", ".metadata is missing"),
        ("empty metadata", ".metadata has 0 bytes of"),
        ("no identity", "trainer.json: KeyError: 'identity'"),
        ("empty", "trainer.json: "),
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_one_before_it(tmp_path: Path, how: str, message: str) -> None:
    training = Training(tmp_path, keep_last=2)
    training.step()
    with training.writer:
        training.save(1)
        training.save(2)
    check_identity(tmp_path / "step_2", {"seed": 1})
    spoil(tmp_path / "step_2", how)
    remedy = r"\): remove that folder, and training goes on from step_1"
    with pytest.raises(DataError, match=rf"the checkpoint .*/step_2 is damaged \({message}.*{remedy}"):
        check_identity(tmp_path / "step_2", {"seed": 1})
    shutil.rmtree(tmp_path / "step_2")
    spoil(tmp_path / "step_1", how)
    with pytest.raises(DataError, match="remove that folder, and training begins afresh"):
        check_identity(tmp_path / "step_1", {"seed": 1})


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_file_spoilt_while_it_is_read_is_named(tmp_path: Path, name: str) -> None:
    training = Training(tmp_path)
    training.step()
    with training.writer:
        training.save(1)
    (tmp_path / "step_1" / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"the checkpoint .*/step_1 is damaged"):
        load_checkpoint(tmp_path / "step_1", training.model, training.optimizer)


def test_checkpoints_set_aside_are_taken_back_for_their_own_config(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    training = Training(directory)
    training.step()
    assert not take_back(directory, {"seed": 1})
    with training.writer:
        training.save(1)
    set_aside(directory)
    assert not take_back(directory, {"seed": 2})
    assert take_back(directory, {"seed": 1})  # where nothing was made since
    assert [path.name for path in checkpoints(directory)] == ["step_1"]
    set_aside(directory)
    with training.writer:
        training.save(7)
    assert take_back(directory, {"seed": 1})
    assert [path.name for path in checkpoints(directory)] == ["step_1"]
    assert [path.name for path in checkpoints(tmp_path / "checkpoints.superseded")] == ["step_7"]


@pytest.mark.parametrize(
    "method",
    [Method(name="lora", lora=Lora(rank=4)), Method(name="full", freeze=["*embed*"])],
    ids=["lora", "frozen embedding"],
)
def test_a_frozen_weight_under_two_names_is_in_no_checkpoint(method: Method) -> None:
    """A pipeline has no such second name, and must be able to go on from it."""
    source = ModelSource(directory=None, architecture=ARCHITECTURES["llama"], random_weights=True)
    model = ParallelModel(
        source=source, method=method, train=Train(max_steps=1, precision="fp32"),
        dims=ParallelDims(strategy="none", world_size=1), seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    named = dict(model.module.named_parameters(remove_duplicate=False))
    assert named["model.lm_head.weight"] is named["model.model.embed_tokens.weight"]
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    assert state_of(model.module, torch.optim.AdamW([torch.zeros(1)])).keys() == {f"model.{n}" for n in trained}
    assert whole_weights(model).keys() == {name.removeprefix("model.") for name in trained}
