"""What each of torchrun's processes does: it builds its part of the model and trains on its share of the rows."""

from __future__ import annotations

import argparse
import logging
import os
from contextlib import ExitStack
from typing import Any

import torch

from dayzero.config import RunConfig
from dayzero.config_checks.training import too_long
from dayzero.console import log
from dayzero.data.loader import TrainBatches, ValidationBatches
from dayzero.data.mixing import Mix
from dayzero.data.tokens import TokenRows
from dayzero.engine import distributed
from dayzero.engine.launch import EXIT_INTERRUPTED, end_with_launcher, errors_reported, keep_output, reports_errors
from dayzero.engine.packing import any_leak, require_causal
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.trainer import Interrupted, Trainer
from dayzero.errors import ConfigError
from dayzero.files import read_json
from dayzero.provenance import Clock
from dayzero.stages.training.checks import require_strategy_and_method
from dayzero.stages.training.inputs import identity, model_source, read_run, teacher_source
from dayzero.stages.training.results import write_results


def run_rank(args: argparse.Namespace) -> None:
    """Train as one rank; errors of all ranks reach the launching process, which says them once."""
    end_with_launcher()
    handlers = log.handlers
    # an error is reported before the group is left: the others, who then miss this rank, must not be first
    with ExitStack() as group, errors_reported(int(os.environ["RANK"])):
        try:
            keep_output()
            run = read_run(args)
            # torchrun may have been started by hand: its number of processes is held against the config's
            ParallelDims(world_size=int(os.environ["WORLD_SIZE"]), **run.parallelism.model_dump())
            require_strategy_and_method(run)
            device = group.enter_context(distributed.process_group())
            if distributed.rank() != 0:
                log.handlers = [logging.NullHandler()]
            _train(run, args, device)
            distributed.barrier()  # no rank leaves while rank 0 still writes
        except Interrupted:
            raise SystemExit(EXIT_INTERRUPTED) from None
        except Exception:
            # the launching process says it, once for all ranks; under a torchrun started by hand each rank does
            log.handlers = [logging.NullHandler()] if reports_errors() else handlers
            raise


def _train(run: RunConfig, args: argparse.Namespace, device: torch.device) -> None:
    clock = Clock()
    dims = ParallelDims(world_size=distributed.world_size(), **run.parallelism.model_dump())
    dims.grad_accum_steps(run.train.global_batch_size, run.train.local_batch_size)
    model = ParallelModel(
        source=model_source(run, args),
        tokenizer_directory=args.tokenizer,
        teacher=teacher_source(run, args),
        method=run.method,
        train=run.train,
        dims=dims,
        seed=run.seed,
        device=device,
    )
    trainer = Trainer(model=model, directory=args.output, identity=identity(run, args))
    require_causal(model)
    leak = any_leak(model) if run.tokenize.packing else None
    if leak is not None:
        log.warning(
            "packed documents see one another in this architecture (logits move by %.2g): training on one a row",
            leak,
        )
    rows = TokenRows(args.tokens / "train", run.tokenize.seq_len, packed=leak is None)
    mix = _mix(run, args, packed=leak is None)
    share: dict[str, Any] = {
        "local_batch_size": run.train.local_batch_size,
        "dp_rank": dims.dp_rank(distributed.rank()),
        "dp_size": dims.dp,
        "num_workers": run.train.num_data_workers,
    }

    def batches(start_step: int = 0) -> TrainBatches:
        return TrainBatches(
            rows,
            global_batch_size=run.train.global_batch_size,
            seed=run.seed,
            max_steps=run.train.max_steps,
            num_epochs=run.train.num_epochs,
            start_step=start_step,
            mix=mix,
            **share,
        )

    validation = None
    if (args.tokens / "validation").is_dir():
        validation = ValidationBatches(TokenRows(args.tokens / "validation", packed=leak is None), **share)
    trainer.max_steps = steps = batches().num_steps
    if problem := too_long(run.train.lr_scheduler, steps):
        raise ConfigError(
            f"train.lr_scheduler: {problem} is more than the {steps} steps that train.num_epochs "
            f"{run.train.num_epochs} makes of {len(rows)} rows: use fewer"
        )
    log.info(
        "%s, %d of %d parameters trained, %d ranks (%s), %d rows, %d steps of %d rows",
        run.method.name, model.trainable_parameters, model.total_parameters, dims.world_size, dims.strategy,
        len(rows), trainer.max_steps, run.train.global_batch_size,
    )  # fmt: skip
    kernels = ", Liger's kernels" if model.fused_kernels else ""
    teacher = f", the teacher's {model.distillation.teacher.attention}" if model.distillation else ""
    log.info("attention %s%s%s", model.attention, kernels, teacher)
    trainer.resume()
    trainer.fit(batches, (lambda: validation) if validation else None)
    done = min(trainer.step * run.train.global_batch_size, batches().num_samples)
    write_results(args.output, run, trainer, rows, clock, mix.describe(done) if mix else None)


def _mix(run: RunConfig, args: argparse.Namespace, packed: bool) -> Mix | None:
    """How the samples are drawn from several sources; None where `data.weights` does not say."""
    if run.data.weights is None:
        return None
    assert isinstance(run.data.source, list)
    sources = read_json(args.tokens / "manifest.json")["splits"]["train"].get("sources")
    if sources is None:
        raise ConfigError(f"data.weights: the rows of {args.tokens} are not kept apart by source: tokenize again")
    counts = [source["rows" if packed else "documents"] for source in sources]
    mix = Mix(counts, run.data.weights, run.data.source)
    for share in mix.describe(len(mix.order)):
        log.info("mix: %.2f %% of the samples from %s", 100 * share["share"], share["source"])
    return mix
