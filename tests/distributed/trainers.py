"""The engine's trainer as the tests of this folder set it up, trained to its end or continued."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from dayzero.config import Method, Train
from dayzero.data.loader import Batch, TrainBatches, ValidationBatches
from dayzero.data.mixing import Mix
from dayzero.data.tokens import TokenRows
from dayzero.engine import distributed, passes
from dayzero.engine.gathering import whole_averages, whole_weights
from dayzero.engine.megatron_fsdp import has_unequal_shards
from dayzero.engine.model import ModelSource
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.sharded import local
from dayzero.engine.trainer import Trainer
from torch.distributed.tensor import DTensor

from tests.tiny import ARCHITECTURES
from tests.whole_weights import all_whole_weights

STEPS = 10
SEED = 4

LR = 3e-3
"""Small enough that rounding does not grow from step to step: with 1e-2 it grew a hundredfold within the ten steps."""

EPS = 1e-6
"""Of Adam. An element whose gradient is all but zero (in lora_A, whose lora_B starts at zero) has rounding for a
gradient, about 1e-9 here; with the usual 1e-8 Adam makes steps of it that differ by up to 1e-4 between any two orders
of summation."""


def settings(job: dict[str, Any]) -> tuple[Train, Method]:
    train = {
        "max_steps": STEPS,
        "global_batch_size": 8,
        "local_batch_size": job.get("local_batch_size", 2),
        "precision": "fp32",
        "optimizer": {"lr": LR, "weight_decay": 0.1, "eps": EPS},
        "lr_scheduler": {"warmup_steps": 2},
        "checkpoint": {"every": 4, "keep_last": 2},
    }
    return Train(**{**train, **job.get("train", {})}), Method(name=job["method"], **job.get("method_options", {}))


class Recorded(TrainBatches):
    """Notes in `drawn` which documents each step was given."""

    drawn: dict[int, list[int]]

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            self.drawn[batch.step + 1] = sorted(batch.row_ids)
            yield batch


def batches_of(job: dict[str, Any], train: Train, start_step: int, dp_rank: int, dp_size: int) -> TrainBatches:
    batches = Recorded(
        TokenRows(job["rows"]),
        global_batch_size=train.global_batch_size,
        local_batch_size=train.local_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        seed=3,
        max_steps=train.max_steps,
        num_epochs=train.num_epochs,
        start_step=start_step,
        num_workers=train.num_data_workers,
        mix=Mix(job["mix"]["rows"], job["mix"]["weights"], ["a", "b"]) if "mix" in job else None,
    )
    batches.drawn = job.setdefault("drawn", {})
    return batches


def source_of(job: dict[str, Any]) -> ModelSource:
    if "directory" in job:
        return ModelSource(directory=Path(job["directory"]))
    fields = {**ARCHITECTURES[job["model"]], **job.get("architecture", {})}
    return ModelSource(directory=None, architecture=fields, random_weights=True)


def seed_of(job: dict[str, Any]) -> int:
    """Of the initial weights."""
    return int(job.get("seed", SEED))


def teacher_of(job: dict[str, Any]) -> ModelSource | None:
    if "teacher" not in job:
        return None
    return ModelSource(directory=None, architecture=ARCHITECTURES[job["teacher"]], random_weights=True)


def make_trainer(job: dict[str, Any], directory: Path) -> Trainer:
    train, method = settings(job)
    sizes = {"strategy": job["strategy"], "dp_replicate": job.get("dp_replicate", 1)}
    names = "tp", "sequence_parallel", "cp", "cp_method", "pp", "pp_schedule", "ep"
    sizes |= {name: job[name] for name in names if name in job}
    rows = distributed.world_size() // sizes.get("tp", 1) // sizes.get("cp", 1) // sizes.get("pp", 1)
    sizes["dp_shard"] = rows // sizes["dp_replicate"]
    model = ParallelModel(
        source=source_of(job),
        teacher=teacher_of(job),
        method=method,
        train=train,
        dims=ParallelDims(world_size=distributed.world_size(), **sizes),
        seed=seed_of(job),
        device=distributed.local_device(),
    )
    max_steps = batches_of(job, train, 0, 0, 1).num_steps
    identity = job.get("identity", {"job": "test"})
    return Trainer(model=model, directory=directory, identity=identity, max_steps=max_steps)


def share_of(trainer: Trainer) -> tuple[int, int]:
    """(data-parallel rank, data-parallel size) of this process."""
    return trainer.dims.dp_rank(distributed.rank()), trainer.dims.dp


def fit(job: dict[str, Any], trainer: Trainer) -> None:
    share = share_of(trainer)
    trainer.fit(
        lambda start: batches_of(job, trainer.train, start, *share),
        (lambda: ValidationBatches(TokenRows(job["rows"]), local_batch_size=2, dp_rank=share[0], dp_size=share[1]))
        if job.get("validate")
        else None,
    )


def all_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in all_whole_weights(trainer.model).items()}


def averages(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The trained weights' averages, whole; nothing without them."""
    if trainer.ema is None:
        return {}
    if not has_unequal_shards(trainer.module):
        return {name: tensor.clone() for name, tensor in whole_averages(trainer.model, trainer.ema).items()}
    with trainer.ema.in_place():
        return {name: tensor.clone() for name, tensor in whole_weights(trainer.model).items()}


def replica_spread(trainer: Trainer) -> float:
    """Largest difference of any parameter between two ranks that should hold the same values, by name: the stages of a
    pipeline hold different ones, but for tied ones."""
    if has_unequal_shards(trainer.module):
        return 0.0  # every row of a parameter is on one rank
    names = trainer.model.names_of_copies
    mine: list[tuple[str, torch.Tensor]] = []
    for name, parameter in trainer.module.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        mine.append((names.get(name, name), whole.detach().clone()))
    everyone: list[Any] = [None] * distributed.world_size()
    torch.distributed.all_gather_object(everyone, mine)
    first: dict[str, torch.Tensor] = {}
    spread = 0.0
    for name, whole in (item for part in everyone for item in part):
        spread = max(spread, (whole - first.setdefault(name, whole)).abs().max().item())
    return spread


def train(job: dict[str, Any], trainer: Trainer | None = None) -> dict[str, Any]:
    """Train with the engine: losses, norms, weights before and after, and the spread between replicas."""
    trainer = trainer or make_trainer(job, Path(job["folder"]))
    before = all_weights(trainer)
    fit(job, trainer)
    return {
        "losses": [r["loss"] for r in trainer.metrics.records],
        "grad_norms": [r["grad_norm"] for r in trainer.metrics.records],
        "checkpoint_seconds": [r["checkpoint_seconds"] for r in trainer.metrics.records],
        "router_losses": [r["router_aux_loss"] for r in trainer.metrics.records if "router_aux_loss" in r],
        "validation_losses": list(trainer.validation_losses.values()),
        "teacher_shares": sorted(
            {p.numel() / local(p).numel() for p in trainer.model.distillation.teacher.parameters()}
            if trainer.model.distillation
            else ()
        ),
        "kls": [r["kl"] for r in trainer.metrics.records if "kl" in r],
        "averages": averages(trainer),
        "before": before,
        "weights": all_weights(trainer),
        "spread": replica_spread(trainer),
        "moments": sorted(
            {str(v.dtype) for s in trainer.optimizer.state.values() for k, v in s.items() if k != "step"}
        ),
        "mesh_axes": sorted(
            {
                a
                for p in trainer.module.parameters()
                if isinstance(p, DTensor)
                for a in p.device_mesh.mesh_dim_names or ()
            }
        ),
        "checkpoints": [p.name for p in sorted(trainer.checkpoints.glob("step_*"))],
        "drawn": job["drawn"],
    }


def resume(job: dict[str, Any]) -> dict[str, Any]:
    """Continue from whatever is in the job's folder; with `lose_moments` without Adam's moments."""
    trainer = make_trainer(job, Path(job["folder"]))
    job["drawn"] = {}
    # as the train stage does before (does the model leak?): FSDP2 leaves gathered weights in the shards' place
    passes.training_logits(trainer.model, torch.arange(1, 33).unsqueeze(0), torch.arange(32).unsqueeze(0))
    trainer.resume()
    started_at = trainer.step
    if job.get("lose_moments"):
        for values in trainer.optimizer.state.values():
            values["exp_avg"].zero_()
            values["exp_avg_sq"].zero_()
    fit({**job, "validate": False}, trainer)
    return {
        "started_at": started_at,
        "losses": [r["loss"] for r in trainer.metrics.records],
        "steps": [r["step"] for r in trainer.metrics.records],
        "averages": averages(trainer),
        "weights": all_weights(trainer),
        "spread": replica_spread(trainer),
        "drawn": job["drawn"],
    }
