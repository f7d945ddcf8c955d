"""Checkpoints to resume from: complete or absent, the last and the best kept, for any number of ranks and any mesh.

A checkpoint is `step_N/`: torch.distributed.checkpoint's files plus `trainer.json`. It is written as `step_N.tmp/` and
renamed by rank 0 once every rank has written its part, so a process killed while saving leaves only a `.tmp`; how, see
`checkpoint_writer.py`. Only trained weights are in it: frozen ones come from the base model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.parallel import DistributedDataParallel

from dayzero.checkpoint_files import checkpoints, step_of
from dayzero.console import log
from dayzero.engine.adamw8bit import stored_parts
from dayzero.engine.distributed import gather_objects, rank
from dayzero.engine.float8 import plain_weight
from dayzero.engine.megatron_fsdp import has_unequal_shards, locate_shards
from dayzero.engine.optimizer import set_lr
from dayzero.engine.sharded import free_gathered, trained_state
from dayzero.engine.transformer_engine import is_extra_state
from dayzero.errors import ConfigError, DataError, one_line
from dayzero.nested import flatten

SHOWN = 3
"""Differing keys in a message."""


NONE: Mapping[str, str] = MappingProxyType({})


def state_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    copies: Mapping[str, str] = NONE,
    *,
    more: Mapping[str, Tensor] = MappingProxyType({}),
    for_saving: bool = False,
) -> dict[str, Tensor]:
    """Name -> tensor of everything a checkpoint holds, sharing the memory of model and optimizer.

    Weights are `model.NAME`, an optimizer's values `optimizer.NAME.KEY`: names are the model's own, so any mesh can
    read them. Learning rate and other settings are not in it; they come from the config. With `for_saving` a rank
    leaves out what rank 0 holds whole too (DDP). `copies`: names of parameters that are copies of others (tied ones in
    a pipeline) -> those; an optimizer's values are there once, under the latter. `more`: other tensors to keep.
    """
    if for_saving and isinstance(model, DistributedDataParallel) and rank() != 0:
        return {}
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    free_gathered(inner)  # the optimizer has the shards
    weights = trained_state(inner).items()
    state = {f"model.{name}": plain_weight(tensor) for name, tensor in weights if not is_extra_state(name)}
    names = {id(parameter): name for name, parameter in inner.named_parameters()}
    moments: dict[str, Tensor] = {}
    for parameter, values in optimizer.state.items():
        name = names[id(parameter)]
        prefix = f"optimizer.{copies.get(name, name)}"
        own = {
            f"{prefix}.{part}": tensor
            for key, value in values.items()
            for part, tensor in stored_parts(parameter, key, value)
        }
        moments = own | moments if name in copies else moments | own
    everything = state | moments | dict(more)
    return locate_shards(everything, for_saving=for_saving) if has_unequal_shards(model) else everything


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    copies: Mapping[str, str] = NONE,
    more: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Load weights and optimizer state in place, resharding to the present ranks; `copies`, `more`: see `state_of`.

    Raises `ConfigError` naming the weights in which the checkpoint differs from the model, `DataError` where it is
    damaged.
    """
    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:
        raise damaged(path, f".metadata: {one_line(error)}") from error
    _make_optimizer_state(optimizer)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    free_gathered(inner)  # the optimizer has the shards
    for name, parameter in inner.named_parameters():
        # a parameter without a gradient so far has no moments yet
        if not any(key.startswith(f"optimizer.{copies.get(name, name)}.") for key in saved):
            optimizer.state.pop(parameter, None)
    state = state_of(model, optimizer, copies, more=more)
    _check_fits(path, saved, state)
    try:
        dcp.load(state, checkpoint_id=path)
    except CheckpointException as error:  # which is no Exception
        raise damaged(path, one_line(first_failure(error))) from error
    parameters = dict(inner.named_parameters())
    for copy, name in copies.items():
        if copy in parameters and name in parameters and parameters[name] in optimizer.state:  # one rank holds both
            for key, value in optimizer.state[parameters[name]].items():
                optimizer.state[parameters[copy]][key].copy_(value)


def _make_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Give a new optimizer its (empty) moments: a step with gradients of zero and a learning rate of zero."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    set_lr(optimizer, 0.0)  # every training step sets its own
    optimizer.step()
    optimizer.zero_grad()


def _check_fits(path: Path, saved: dict[str, Any], state: dict[str, Tensor]) -> None:
    wrong = [f"no {name}" for name in state if name not in saved]
    for name, tensor in state.items():
        size = getattr(saved.get(name), "size", None)
        if size is not None and size != tensor.shape:
            wrong.append(f"{name} {list(size)} where the model has {list(tensor.shape)}")
    # the ranks of a pipeline hold different tensors
    everyone: list[tuple[list[str], list[str]]] = gather_objects((list(state), wrong))
    held = {name for names, _ in everyone for name in names}
    wrong = list(dict.fromkeys(line for _, lines in everyone for line in lines))
    wrong += [f"{name} that the model has not" for name in saved if name not in held]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ConfigError(
            f"{path} is a checkpoint of another model, with {'; '.join(wrong[:SHOWN])}{more}: "
            f"continue it with its own model, or remove {path.parent} to train afresh"
        )


def read_trainer(path: Path) -> dict[str, Any]:
    """The checkpoint's trainer.json. Raises `DataError` where it cannot be read, or a file is not as it was written."""
    try:
        saved: dict[str, Any] = json.loads((path / "trainer.json").read_text(encoding="utf-8"))
        files, _, _ = saved["files"], saved["identity"], saved["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"trainer.json: {one_line(error)}") from error
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            raise damaged(path, f"{name} is missing")
        if file.stat().st_size != size:
            raise damaged(path, f"{name} has {file.stat().st_size} bytes of {size}")
    return saved


def damaged(path: Path, what: str) -> DataError:
    """The error of a checkpoint that cannot be read, with the remedy."""
    before = [other for other in checkpoints(path.parent) if step_of(other) < step_of(path)]
    then = f"goes on from {before[-1].name}" if before else "begins afresh"
    return DataError(f"the checkpoint {path} is damaged ({what}): remove that folder, and training {then}")


def first_failure(error: CheckpointException) -> Exception:
    """What went wrong on the first of the ranks that failed."""
    reason = error.failures[min(error.failures)][0]
    return reason if isinstance(reason, Exception) else RuntimeError(str(reason))


def check_identity(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's trainer.json, if it was made by the same config.

    Raises `ConfigError` naming every key that differs, since continuing would mix two experiments, and what
    `read_trainer` does.
    """
    saved = read_trainer(path)
    old, new = flatten(saved["identity"]), flatten(identity)
    differing = [f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if differing:
        raise ConfigError(
            f"{path} was made by another config ({'; '.join(differing)}): "
            f"restore those values to continue it, or remove {path.parent} to train afresh"
        )
    return saved


def prune(directory: Path, keep_last: int, keep_best: int, validation_losses: dict[int, float]) -> None:
    """Remove all but the newest `keep_last` checkpoints and the `keep_best` with the lowest validation loss.

    `validation_losses`: by step; a checkpoint of a step without one cannot be among the best.
    """
    found = checkpoints(directory)
    best = sorted((p for p in found if step_of(p) in validation_losses), key=lambda p: validation_losses[step_of(p)])
    for path in set(found) - {*found[-keep_last:], *best[:keep_best]}:
        # out of sight first: half a checkpoint must not look like a whole one
        doomed = path.with_name(path.name + ".tmp")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def best_checkpoint(directory: Path, validation_losses: dict[int, float]) -> Path | None:
    """The complete checkpoint with the lowest validation loss, the earliest of equals; None without any."""
    found = [p for p in checkpoints(directory) if step_of(p) in validation_losses]
    return min(found, key=lambda p: validation_losses[step_of(p)], default=None)


def set_aside(directory: Path) -> Path:
    """Move a folder of checkpoints away so that training starts afresh; one such folder is kept."""
    aside = superseded(directory)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(directory, aside)
    return aside


def take_back(directory: Path, identity: dict[str, Any]) -> bool:
    """Exchange `directory`, which may be missing, for what was set aside, if that has checkpoints of this identity."""
    aside, between = superseded(directory), directory.with_name(directory.name + ".tmp")
    found = checkpoints(aside)
    try:
        if not found or not check_identity(found[-1], identity):
            return False
    except ValueError:
        return False
    shutil.rmtree(between, ignore_errors=True)
    if directory.exists():
        os.replace(directory, between)
    os.replace(aside, directory)
    if between.exists():
        os.replace(between, aside)
    return True


def superseded(directory: Path) -> Path:
    """Where checkpoints of another config are set aside."""
    return directory.with_name(directory.name + ".superseded")


def remove_unfinished(directory: Path) -> None:
    """Delete what a killed process left half written."""
    for path in directory.glob("step_*.tmp"):
        log.warning("removing the unfinished checkpoint %s", path)
        shutil.rmtree(path, ignore_errors=True)


def sync_directory(directory: Path) -> None:
    """Have the names in `directory` on the disk before anything that follows."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
