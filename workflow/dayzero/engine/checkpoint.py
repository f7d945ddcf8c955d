"""Checkpoints to resume from: complete or absent, the last few kept, for any number of ranks.

A checkpoint is `step_N/`: torch.distributed.checkpoint's files plus `trainer.json`. It is written as `step_N.tmp/` and
renamed by rank 0 once every rank has written its part, so a process killed while saving leaves only a `.tmp`.
Only trained weights are in it: frozen ones come from the base model.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from dayzero.console import log
from dayzero.engine.distributed import barrier, rank
from dayzero.errors import ConfigError
from dayzero.files import read_json, write_json

OPTIONS = StateDictOptions(ignore_frozen_params=True)


def save_checkpoint(
    directory: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, trainer: dict[str, Any], keep: int
) -> Path:
    """Write `directory/step_N` with weights, optimizer and `trainer` (JSON values); all ranks call it together."""
    final, temporary = directory / f"step_{step}", directory / f"step_{step}.tmp"
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary)
    if rank() == 0:
        write_json(temporary / "trainer.json", {"step": step, **trainer})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _sync_directory(directory)
        for old in checkpoints(directory)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    barrier()
    return final


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights and optimizer state in place, resharding to the present ranks."""
    weights, moments = get_state_dict(model, optimizer, options=OPTIONS)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [
        p for p in directory.glob("step_*") if re.fullmatch(r"step_\d+", p.name) and (p / "trainer.json").is_file()
    ]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def check_identity(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's trainer.json, if it was made by the same config.

    Raises `ConfigError` naming every key that differs, since continuing would mix two experiments.
    """
    saved = read_json(path / "trainer.json")
    old, new = _flatten(saved["identity"]), _flatten(identity)
    differing = [f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    if differing:
        raise ConfigError(
            f"{path} was made by another config ({'; '.join(differing)}): "
            f"restore those values to continue it, or remove {path.parent} to train afresh"
        )
    return saved


def set_aside(directory: Path) -> Path:
    """Move a folder of checkpoints away so that training starts afresh; one such folder is kept."""
    aside = directory.with_name(directory.name + ".superseded")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(directory, aside)
    return aside


def remove_unfinished(directory: Path) -> None:
    """Delete what a killed process left half written."""
    for path in directory.glob("step_*.tmp"):
        log.warning("removing the unfinished checkpoint %s", path)
        shutil.rmtree(path, ignore_errors=True)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for name, child in value.items() for k, v in _flatten(child, f"{prefix}.{name}").items()}
    return {prefix.lstrip("."): value}


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
