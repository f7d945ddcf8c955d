"""What the ranks of a test do: `python -m tests.distributed.jobs FOLDER` under torchrun.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from dayzero.engine import distributed, passes
from dayzero.engine.gathering import float32_logits
from dayzero.engine.model import build_model
from dayzero.engine.optimizer import clip_grad_norm
from dayzero.engine.packing import any_leak

from tests.distributed import frozen_weights
from tests.distributed.cuda_stand_in import cuda_stand_in
from tests.distributed.faults import (
    bad_step,
    failing_save,
    stopped_in_step,
    train_until_killed_in_save,
    train_with_late_writes,
)
from tests.distributed.loading import load
from tests.distributed.optimizers import optimizers
from tests.distributed.reference import reference
from tests.distributed.split_vocabulary import split_vocabulary
from tests.distributed.trainers import (
    all_weights,
    batches_of,
    fit,
    make_trainer,
    resume,
    seed_of,
    share_of,
    source_of,
    train,
)
from tests.tiny import write_rows


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
        plain = build_model(source, source.config(), trainer.model.method, seed=seed_of(job), meta=False).eval()
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
        *(reduced_early, split_vocabulary),
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
