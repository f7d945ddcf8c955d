"""What the ranks of a test do: `python -m tests.distributed.jobs FOLDER` under torchrun.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dayzero.config import Method, Train
from dayzero.data.loader import Batch, TrainBatches, ValidationBatches
from dayzero.data.mixing import Mix
from dayzero.data.tokens import TokenRows
from dayzero.engine import checkpoint_writer, distributed, passes
from dayzero.engine.gathering import float32_logits, whole_averages, whole_weights
from dayzero.engine.megatron_fsdp import has_unequal_shards
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.optimizer import clip_grad_norm
from dayzero.engine.packing import any_leak
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.trainer import Interrupted, Trainer
from torch.distributed.tensor import DTensor

from tests.distributed import frozen_weights
from tests.distributed.cuda_stand_in import cuda_stand_in
from tests.distributed.loading import load
from tests.distributed.optimizers import optimizers
from tests.tiny import ARCHITECTURES, write_rows
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


def teacher_of(job: dict[str, Any]) -> ModelSource | None:
    if "teacher" not in job:
        return None
    return ModelSource(directory=None, architecture=ARCHITECTURES[job["teacher"]], random_weights=True)


def reference(job: dict[str, Any]) -> dict[str, Any]:
    """The same training by a plain loop: one process, all logits, one mean over the whole batch, no engine code but
    the model's construction and the loader."""
    train, method = settings(job)
    source = source_of(job)
    model = build_model(source, source.config(), method, seed=SEED, meta=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    embeddings = {id(model.get_input_embeddings().weight)}
    groups = [
        {"params": [p for p in parameters if p.ndim > 1 and id(p) not in embeddings], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2 or id(p) in embeddings], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=EPS, foreach=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages = {name: tensor.clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    teacher = teacher_of(job)
    if teacher is not None:
        teacher = build_model(teacher, teacher.config(), Method(name="none"), seed=0, meta=False).eval()
    losses, norms, router_losses, kls = [], [], [], []
    coefficient = train.router_aux_loss_coef
    whole = Train(**{**train.model_dump(), "local_batch_size": train.global_batch_size})
    batches = batches_of(job, whole, 0, 0, 1)
    decay = batches.num_steps - 2
    for batch in batches:
        step = batch.step + 1
        lr = LR * (step / 2 if step <= 2 else 0.5 * (1 + math.cos(math.pi * (step - 3) / decay)))
        for group in groups:
            group["lr"] = lr
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr
        (micro,) = batch.micro_batches
        logits = model(input_ids=micro["input_ids"], position_ids=micro["position_ids"], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), micro["labels"].flatten(), ignore_index=-100)
        if train.z_loss:
            supervised = logits[micro["labels"] != -100]
            loss = loss + train.z_loss * supervised.exp().sum(-1).log().square().mean()
        if teacher is not None:
            kd, supervised = method.kd, micro["labels"] != -100
            with torch.no_grad():
                taught = teacher(input_ids=micro["input_ids"], position_ids=micro["position_ids"], use_cache=False)
            p, q = ((x[supervised].double() / kd.temperature).softmax(-1) for x in (taught.logits, logits))
            kls.append((kd.temperature**2 * (p * (p / q).log()).sum(-1).mean()).item())
            loss = loss + kd.weight * kd.temperature**2 * (p * (p / q).log()).sum(-1).mean()
        if coefficient:
            router_loss = plain_router_loss(model, micro)
            router_losses.append(router_loss.item())
            loss = loss + coefficient * router_loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if train.ema:
            for name, parameter in model.named_parameters():
                if name in averages:
                    averages[name] = train.ema.decay * averages[name] + (1 - train.ema.decay) * parameter.detach()
    return {
        "kls": kls,
        "averages": {k: t.detach() for k, t in averages.items()} if train.ema else {},
        "losses": losses,
        "grad_norms": norms,
        "router_losses": router_losses,
        "before": before,
        "weights": dict(model.state_dict()),
    }


def plain_router_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers' own load balancing loss of each row alone, without padding, averaged over the rows."""
    row_losses = []
    for b, length in enumerate(batch["lengths"].tolist()):
        if not length:
            continue
        row = {name: batch[name][b : b + 1, :length] for name in ("input_ids", "position_ids")}
        row_losses.append(model(**row, use_cache=False, output_router_logits=True).aux_loss)
    return torch.stack(row_losses).mean()


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
        seed=SEED,
        device=distributed.local_device(),
    )
    max_steps = batches_of(job, train, 0, 0, 1).num_steps
    identity = job.get("identity", {"job": "test"})
    return Trainer(model=model, directory=directory, identity=identity, max_steps=max_steps)


def share_of(trainer: Trainer) -> tuple[int, int]:
    """(data-parallel rank, data-parallel size) of this process."""
    return trainer.dims.dp_rank(distributed.rank()), trainer.dims.dp


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


def fit(job: dict[str, Any], trainer: Trainer) -> None:
    share = share_of(trainer)
    trainer.fit(
        lambda start: batches_of(job, trainer.train, start, *share),
        (lambda: ValidationBatches(TokenRows(job["rows"]), local_batch_size=2, dp_rank=share[0], dp_size=share[1]))
        if job.get("validate")
        else None,
    )


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


def reduced_early(job: dict[str, Any]) -> dict[str, Any]:
    """After the first of several micro-batches: whose gradients are shards already, and how many are whole yet."""
    trainer = make_trainer(job, Path(job["folder"]))
    first, *_ = batches_of(job, trainer.train, 0, *share_of(trainer))
    with passes._gradient_sync(trainer.model, last=False):
        passes.summed_loss(trainer.model, first.micro_batches[0]).backward()
    trained = {name: p for name, p in trainer.module.named_parameters() if p.requires_grad}
    reduced = sorted(name for name, p in trained.items() if p.grad is not None)
    return {"reduced": reduced, "whole": len(trained) - len(reduced)}


def leak(job: dict[str, Any]) -> dict[str, Any]:
    """What the packing probe says of a freshly built model."""
    return {"leak": any_leak(make_trainer(job, Path(job["folder"])).model)}


def same_shape_again(job: dict[str, Any]) -> dict[str, Any]:
    """Twice the gradients of the same rows, then those of longer ones, then of the first: (loss, norm) of each."""
    trainer = make_trainer(job, Path(job["folder"]))
    first, second = (batches_of(job, trainer.train, step, *share_of(trainer))[step].micro_batches for step in (0, 1))
    found = []
    for rows in (first, first, second, first):
        pipeline, copies = trainer.model.pipeline, trainer.model.copies
        assert pipeline is not None
        loss = trainer._sum_over_tokens(pipeline.train(rows, 1e-3))
        norm = clip_grad_norm(trainer.module.parameters(), 0.0, copies=copies, across=pipeline.group)
        trainer.optimizer.zero_grad()
        found.append([loss, norm])
    return {"found": found}


def bf16_logits(job: dict[str, Any]) -> dict[str, Any]:
    """Train in bf16; the logits of the trained weights in training's precision, in float32, and by a plain model."""
    trainer = make_trainer(job, Path(job["folder"]))
    share = share_of(trainer)
    trainer.fit(lambda start: batches_of(job, trainer.train, start, *share), None)
    row = torch.arange(1, 33).unsqueeze(0)
    places = torch.arange(32).unsqueeze(0)
    found = {
        "bf16": passes.training_logits(trainer.model, row, places),
        "float32": float32_logits(trainer.model, row, places),
    }
    weights = all_weights(trainer)
    if distributed.rank() == 0:
        source = source_of(job)
        plain = build_model(source, source.config(), trainer.model.method, seed=SEED, meta=False).eval()
        found["untrained"] = plain(input_ids=row).logits.detach()
        plain.load_state_dict(weights, strict="fp8" not in job["train"])  # frozen weights in 8 bits are not in it
        found["plain"] = plain(input_ids=row).logits.detach()
    return found


def frozen(job: dict[str, Any]) -> dict[str, Any]:
    return frozen_weights.frozen(job, make_trainer, lambda job, trainer: fit({**job, "validate": False}, trainer))


JOBS = {
    job.__name__: job
    for job in (
        *(bf16_logits, frozen, leak, load, optimizers, reference, train, resume, bad_step, same_shape_again),
        reduced_early,
        *(train_with_late_writes, train_until_killed_in_save, failing_save, stopped_in_step),
    )
}


def main(folder: Path) -> None:
    # on a GPU some of what models use has no deterministic kernel
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    results = {}
    with distributed.process_group():
        for job in json.loads((folder / "jobs.json").read_text()):
            started, cpu = time.perf_counter(), time.process_time()
            if distributed.rank() == 0:
                print(job["name"], end=" ", flush=True)
                write_rows(Path(job["rows"]), packed=job["packed"], documents=job.get("documents", 40))
            distributed.barrier()
            torch._dynamo.reset()  # as in a process of its own
            with cuda_stand_in() if job.get("strategy") == "megatron_fsdp" else nullcontext():
                results[job["name"]] = JOBS[job["run"]](job)
            distributed.barrier()
            if distributed.rank() == 0:
                print(f"{time.perf_counter() - started:.2f} s, CPU {time.process_time() - cpu:.2f} s", flush=True)
        if distributed.rank() == 0:
            torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
