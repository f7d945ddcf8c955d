"""Trainings that are stopped, killed, or cannot write or compute something."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from dayzero.data.loader import Batch
from dayzero.engine import checkpoint_writer, distributed
from dayzero.engine.trainer import Interrupted

from tests.distributed.trainers import STEPS, all_weights, batches_of, fit, make_trainer, share_of, train


@contextmanager
def saving(save: Callable[..., None]) -> Iterator[None]:
    """While active, `save(real, state, step, **options)` is what writes a rank's share of a checkpoint."""
    real = checkpoint_writer.dcp.save

    def instead(state: Any, *, storage_writer: Any, **options: Any) -> None:
        step = int(storage_writer.path.stem.removeprefix("step_"))
        save(real, state, step, storage_writer=storage_writer, **options)

    checkpoint_writer.dcp.save = instead
    try:
        yield
    finally:
        checkpoint_writer.dcp.save = real


def train_with_late_writes(job: dict[str, Any]) -> dict[str, Any]:
    """Each checkpoint is written only when the next optimizer step has changed the weights."""
    trainer = make_trainer(job, Path(job["folder"]))

    def save(real: Any, state: Any, step: int, **options: Any) -> None:
        while step < STEPS and trainer.step == step:
            time.sleep(0.01)
        real(state, **options)

    with saving(save):
        return train(job, trainer)


def train_until_killed_in_save(job: dict[str, Any]) -> dict[str, Any]:
    """Every rank is killed (SIGKILL), in the middle of training, when the second checkpoint has been written in the
    background but not yet renamed."""
    trainer = make_trainer(job, Path(job["folder"]))

    def save(real: Any, state: Any, step: int, **options: Any) -> None:
        real(state, **options)
        if step == 8:
            while trainer.step == 8:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    with saving(save):
        return train(job, trainer)


def failing_save(job: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 finds the disk full while it writes step 4, or rank 0 when it renames it: what every rank raises."""
    trainer = make_trainer(job, Path(job["folder"]))
    real_replace = os.replace

    def full(path: object) -> None:
        if "step_4" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(real: Any, state: Any, step: int, storage_writer: Any, **options: Any) -> None:
        if job["fails"] == "write" and distributed.rank() == 1:
            storage_writer.write_data = lambda *_: full(storage_writer.path)
        real(state, storage_writer=storage_writer, **options)

    def replace(old: Any, new: Any) -> None:
        if job["fails"] == "rename" and str(new).endswith("step_4"):
            full(new)
        real_replace(old, new)

    said = None
    os.replace = replace
    try:
        with saving(write):
            fit(job, trainer)
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        os.replace = real_replace
    raised: list[Any] = [None] * distributed.world_size()
    torch.distributed.all_gather_object(raised, [said, trainer.step])
    return {"raised": raised, "left": sorted(p.name for p in trainer.checkpoints.glob("step_*"))}


def stopped_in_step(job: dict[str, Any]) -> dict[str, Any]:
    """The last rank is asked to stop in the middle of step `stop_in` (0: before the first): where every rank stops."""
    trainer = make_trainer(job, Path(job["folder"]))
    step = trainer.optimizer.step

    def asked() -> None:
        if distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    def stepped(*arguments: Any) -> Any:
        if trainer.step == job["stop_in"] - 1:
            asked()
        return step(*arguments)

    trainer.optimizer.step = stepped
    batches = batches_of(job, trainer.train, 0, *share_of(trainer))
    started: list[int] = []

    def begun(_: int) -> Iterator[Batch]:
        if not job["stop_in"]:
            asked()
        for batch in batches:
            started.append(batch.step + 1)
            yield batch

    interrupted = False
    try:
        trainer.fit(begun, None)
    except Interrupted:
        interrupted = True
    everyone = [interrupted, trainer.step, sorted(p.name for p in trainer.checkpoints.glob("step_*"))]
    said: list[Any] = [None] * distributed.world_size()
    torch.distributed.all_gather_object(said, everyone)
    return {"said": said, "steps": [r["step"] for r in trainer.metrics.records]}


def bad_step(job: dict[str, Any]) -> dict[str, Any]:
    """Train and validate with one weight set to infinity; the errors' texts and what the optimizer did."""
    trainer = make_trainer(job, Path(job["folder"]))
    with torch.no_grad():
        next(p for p in trainer.module.parameters() if p.requires_grad).fill_(float("inf"))
    before = all_weights(trainer)
    said: dict[str, Any] = {"error": None}
    try:
        trainer.fit(lambda start: batches_of(job, trainer.train, start, *share_of(trainer)), None)
    except ValueError as error:
        after = all_weights(trainer)
        same = all(torch.equal(before[k], after[k]) for k in before)
        said = {"error": str(error), "weights_unchanged": same, "type": type(error).__name__}
    try:
        trainer.validate(islice(batches_of(job, trainer.train, 0, *share_of(trainer)), 1))
    except ValueError as error:
        said["validation_error"] = str(error)
    return said
