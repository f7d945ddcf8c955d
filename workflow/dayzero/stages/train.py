"""Train one run: token rows and a model in, metrics, checkpoints and (for LoRA) an adapter out.

Started by a person or a rule it checks what can be checked without a process group and starts torchrun on itself; the
processes that torchrun starts do the training.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from dayzero import attempts, slurm
from dayzero.config import RunConfig
from dayzero.console import log
from dayzero.errors import ConfigError
from dayzero.files import atomic_directory, atomic_file, read_json, sha256_json, write_json
from dayzero.interruption import stop_or_go_on, stopped_in_time
from dayzero.provenance import Clock
from dayzero.run_lock import RunLock
from dayzero.stages.base import read_config, run_stage, stage_parser

if TYPE_CHECKING:
    from dayzero.engine.parallel_dims import ParallelDims

PROBE_TOKENS = 32
"""Length of the text on which the exported model must give the logits of training."""

FREE_TO_CHANGE = {
    "train": {
        "local_batch_size", "loss", "loss_chunk_size", "activation_checkpointing", "compile", "validate_every",
        "checkpoint", "num_data_workers", "cpu_offload", "attention", "kernels",
    },
}  # fmt: skip
"""Keys that do not decide what is learnt: a checkpoint may be continued with other values, on other ranks too."""


def main(argv: list[str] | None = None) -> int:
    parser = stage_parser("train", __doc__)
    parser.add_argument("--tokens", type=Path, required=True, help="store/tokens/KEY")
    parser.add_argument("--model", type=Path, help="store/models/KEY; not for random weights from model.architecture")
    parser.add_argument("--tokenizer", type=Path, help="store/tokenizers/KEY, with model.architecture")
    parser.add_argument("--teacher", type=Path, help="the teacher of method kd: store/models/KEY or {run}/model")
    parser.add_argument("--output", type=Path, required=True, help="{experiment}/{run}/train")
    parser.add_argument(
        "--set-aside-other-checkpoints",
        action="store_true",
        help="train afresh where the checkpoints are of another config (default: refuse, naming the differing keys)",
    )
    machine = parser.add_argument_group("where it runs; changes no result")
    machine.add_argument("--nodes", type=int, default=1, help="nodes of a SLURM job (default 1)")
    machine.add_argument("--max-requeues", type=int, default=100, help="times a SLURM job is put back (default 100)")
    machine.add_argument("--stop-before", type=int, default=0, help="seconds before a job's end to stop at (default 0)")
    machine.add_argument("--network-interface", help="network interface of every node for NCCL and gloo")
    arguments = sys.argv[1:] if argv is None else argv

    from dayzero.engine.launch import is_worker

    if is_worker():
        return run_stage(parser, _rank, argv)
    return run_stage(parser, lambda args: _launch(args, arguments), argv)


def _launch(args: argparse.Namespace, arguments: list[str]) -> None:
    from dayzero.data.loader import check_rows
    from dayzero.data.tokens import TokenRows
    from dayzero.engine.float8 import require_float8
    from dayzero.engine.kernels import require_kernels
    from dayzero.engine.megatron_fsdp import require_megatron_fsdp
    from dayzero.engine.optimizer import require_optimizer
    from dayzero.engine.parallel_dims import ParallelDims
    from dayzero.engine.quantized import require_qlora

    run = _read_run(args)
    sizes = run.parallelism.model_dump()
    dims = ParallelDims(world_size=run.parallelism.world_size, **sizes)
    if dims.strategy == "megatron_fsdp":
        require_megatron_fsdp()
    if run.method.name == "qlora":
        require_qlora()
    require_kernels(run.train)
    require_optimizer(run.train.optimizer)
    if run.train.fp8:
        require_float8(run.train.fp8)
    dims.grad_accum_steps(run.train.global_batch_size, run.train.local_batch_size)
    check_rows(TokenRows(args.tokens / "train", run.tokenize.seq_len), dims.dp)  # before any process is started
    if run.train.checkpoint.keep_best and not (args.tokens / "validation").is_dir():
        raise ConfigError(
            f"train.checkpoint.keep_best {run.train.checkpoint.keep_best} needs a validation loss, but {args.tokens} "
            "has no validation rows: hold some out (data.validation_size), or set keep_best to 0"
        )
    _check_fit(run, args, dims)
    job = slurm.current_job()
    with RunLock(args.output, job=job) as lock:
        finished = _run(run, args, arguments, job, lock.last_sign)
    if not finished:
        stop_or_go_on(args.output, job, args.max_requeues)


def _run(
    run: RunConfig, args: argparse.Namespace, arguments: list[str], job: slurm.Job | None, last_sign: float | None
) -> bool:
    """Start the ranks where they belong, on the nodes of a SLURM job or here; False when they stopped as asked."""
    from dayzero.engine import checkpoint
    from dayzero.engine.launch import run_torchrun
    from dayzero.engine.launch_nodes import NodeSettings, run_on_nodes

    directory = args.output / "checkpoints"
    if found := checkpoint.checkpoints(directory):
        try:
            checkpoint.check_identity(found[-1], identity(run, args))
        except ConfigError as error:
            if not args.set_aside_other_checkpoints:
                raise
            log.warning("training afresh; the old checkpoints are in %s: %s", checkpoint.set_aside(directory), error)
            (args.output / attempts.FILE).unlink(missing_ok=True)
    for path in (args.output / "metrics.jsonl", args.output / "summary.json"):
        path.unlink(missing_ok=True)
    world_size = run.parallelism.world_size
    with attempts.recorded(args.output, job, run.train.checkpoint.every, last_sign):
        if job is None or slurm.in_job_step():
            if args.nodes > 1:
                log.info("not in a SLURM job's batch script: all %d processes run on this machine", world_size)
            with stopped_in_time(job, args.stop_before) if job else nullcontext():
                return run_torchrun("dayzero.stages.train", arguments, world_size)
        settings = NodeSettings(nodes=args.nodes, network_interface=args.network_interface)
        logs = args.output.parent / "logs" / "ranks"
        return run_on_nodes("dayzero.stages.train", arguments, world_size, job, settings, folder=args.output, logs=logs)


def _check_fit(run: RunConfig, args: argparse.Namespace, dims: ParallelDims) -> None:
    """Hold the token rows against the model, its context and its vocabulary, and the pipeline against its layers.

    Raises `ConfigError`.
    """
    from dayzero.data.model_files import context_length
    from dayzero.data.tokenizer import check_same_tokens
    from dayzero.data.tokens import TokenRows

    config = _source(run, args).config(args.tokenizer)
    longest, context = TokenRows(args.tokens / "train").longest(), context_length(config)
    if context is not None and longest > context:
        raise ConfigError(
            f"tokenize.seq_len {run.tokenize.seq_len}: {args.tokens} has rows of {longest} tokens, but the model's "
            f"context is {context}: set it to {context} or less"
        )
    largest = read_json(args.tokens / "manifest.json")["max_token_id"]
    vocab_size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    if vocab_size is not None and largest >= vocab_size:
        raise ConfigError(
            f"{args.tokens} has the token id {largest}, but the model's vocab_size is {vocab_size}: use the model's "
            "own tokenizer, or a larger model.architecture.vocab_size"
        )
    chosen = run.method.adapters or run.method.freeze or run.train.router_aux_loss_coef or run.train.fp8
    chosen = chosen or run.train.loss not in ("auto", "chunked", "cross_entropy")
    if args.teacher:
        check_same_tokens(args.tokenizer or args.model, args.teacher, str(run.method.kd.teacher))
    if chosen or args.teacher or dims.pp > 1 or dims.ep > 1 or dims.tp > 1 or dims.strategy == "megatron_fsdp":
        _check_model(run, args, dims)


def _check_model(run: RunConfig, args: argparse.Namespace, dims: ParallelDims) -> None:
    """Hold what the config says of layers and experts against the model without weights. Raises `ConfigError`."""
    import torch

    from dayzero.config import Method
    from dayzero.engine.distillation import check_vocabularies
    from dayzero.engine.expert_parallel import check_expert_parallel
    from dayzero.engine.float8 import convert_to_float8
    from dayzero.engine.loss_choice import choose_loss
    from dayzero.engine.megatron_fsdp import check_megatron_fsdp
    from dayzero.engine.model import ModelSource, build_model
    from dayzero.engine.pipeline_cut import check_pipeline
    from dayzero.engine.router_loss import router_loss_coefficient
    from dayzero.engine.tensor_parallel import tensor_parallel_plan

    source = _source(run, args)
    model = build_model(source, source.config(args.tokenizer), run.method, run.seed, meta=True)
    router_loss_coefficient(model, run.train.router_aux_loss_coef, dims)
    choose_loss(model, run.train, dims, cuda=torch.cuda.is_available())
    if args.teacher:
        of_teacher = ModelSource(directory=args.teacher, trust_remote_code=run.model.trust_remote_code)
        teacher = build_model(of_teacher, of_teacher.config(), Method(name="none"), 0, meta=True)
        check_vocabularies(model, teacher, str(run.method.kd.teacher))
        if dims.tp > 1:
            tensor_parallel_plan(teacher, dims.tp, sequence_parallel=dims.sequence_parallel)
    if dims.strategy == "megatron_fsdp":
        check_megatron_fsdp(model)
    if run.train.fp8:
        convert_to_float8(model, run.train.fp8)
    if dims.ep > 1:
        check_expert_parallel(model, dims.ep)
    if dims.pp > 1:
        check_pipeline(model, dims)
    if dims.tp > 1:
        tensor_parallel_plan(model, dims.tp, sequence_parallel=dims.sequence_parallel)


def _source(run: RunConfig, args: argparse.Namespace) -> Any:
    from dayzero.engine.model import ModelSource

    return ModelSource(
        directory=args.model,
        architecture=run.model.architecture,
        random_weights=run.method.name == "pretrain",
        trust_remote_code=run.model.trust_remote_code,
    )


def _teacher(run: RunConfig, args: argparse.Namespace) -> Any:
    from dayzero.engine.model import ModelSource

    if args.teacher is None:
        return None
    return ModelSource(directory=args.teacher, trust_remote_code=run.model.trust_remote_code)


def _rank(args: argparse.Namespace) -> None:
    from dayzero.engine.parallel_dims import ParallelDims

    # torchrun may have been started by hand: its number of processes is held against the config's before they meet
    run = _read_run(args)
    ParallelDims(world_size=int(os.environ["WORLD_SIZE"]), **run.parallelism.model_dump())

    from dayzero.engine import distributed
    from dayzero.engine.launch import EXIT_INTERRUPTED, errors_reported, keep_output, reports_errors
    from dayzero.engine.megatron_fsdp import require_megatron_fsdp
    from dayzero.engine.quantized import require_qlora
    from dayzero.engine.signals import note_early
    from dayzero.engine.trainer import Interrupted

    if reports_errors():
        note_early()
    keep_output()
    if run.method.name == "qlora":
        require_qlora()
    if run.parallelism.strategy == "megatron_fsdp":
        require_megatron_fsdp()
    handlers = log.handlers
    with distributed.process_group() as device, errors_reported(distributed.rank()):
        if distributed.rank() != 0:
            log.handlers = [logging.NullHandler()]
        try:
            _train(args, device)
            distributed.barrier()  # no rank leaves while rank 0 still writes
        except Interrupted:
            raise SystemExit(EXIT_INTERRUPTED) from None
        except Exception:
            # the launching process says it, once for all ranks; under a torchrun started by hand each rank does
            log.handlers = [logging.NullHandler()] if reports_errors() else handlers
            raise


def _train(args: argparse.Namespace, device: Any) -> None:
    from dayzero.data.loader import TrainBatches, ValidationBatches
    from dayzero.data.tokens import TokenRows
    from dayzero.engine import distributed
    from dayzero.engine.parallel_dims import ParallelDims
    from dayzero.engine.trainer import Trainer

    clock = Clock()
    run = _read_run(args)
    dims = ParallelDims(world_size=distributed.world_size(), **run.parallelism.model_dump())
    dims.grad_accum_steps(run.train.global_batch_size, run.train.local_batch_size)
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

    trainer = Trainer(
        source=_source(run, args),
        teacher=_teacher(run, args),
        tokenizer_directory=args.tokenizer,
        method=run.method,
        train=run.train,
        dims=dims,
        seed=run.seed,
        device=device,
        directory=args.output,
        identity=identity(run, args),
    )
    trainer.require_causal()
    leak = trainer.packing_leak() if run.tokenize.packing else None
    if leak is not None:
        log.warning(
            "packed documents see one another in this architecture (logits move by %.2g): training on one a row",
            leak,
        )
    rows = TokenRows(args.tokens / "train", run.tokenize.seq_len, packed=leak is None)
    mix = _mix(run, args, packed=leak is None)
    trainer.max_steps = batches().num_steps
    log.info(
        "%s, %d of %d parameters trained, %d ranks (%s), %d rows, %d steps of %d rows",
        run.method.name, trainer.trainable_parameters, trainer.total_parameters, dims.world_size, dims.strategy,
        len(rows), trainer.max_steps, run.train.global_batch_size,
    )  # fmt: skip
    log.info("attention %s%s", trainer.attention, ", Liger's kernels" if trainer.fused_kernels else "")
    validation = None
    if (args.tokens / "validation").is_dir():
        validation = ValidationBatches(TokenRows(args.tokens / "validation", packed=leak is None), **share)
    trainer.resume()
    trainer.fit(batches, (lambda: validation) if validation else None)
    done = min(trainer.step * run.train.global_batch_size, batches().num_samples)
    _write_results(args, run, trainer, rows, clock, mix.describe(done) if mix else None)


def _mix(run: RunConfig, args: argparse.Namespace, packed: bool) -> Any:
    """How the samples are drawn from several sources; None where `data.weights` does not say."""
    from dayzero.data.mixing import Mix

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


def _write_results(
    args: argparse.Namespace, run: RunConfig, trainer: Any, rows: Any, clock: Clock, mix: list[dict[str, Any]] | None
) -> None:
    """Adapter, probe logits, metrics.jsonl and, last, summary.json. All ranks take part, rank 0 writes."""
    import torch
    from safetensors.torch import save_file

    from dayzero.engine.checkpoint import best_checkpoint, step_of
    from dayzero.engine.lora import save_adapter

    row = rows.row(0)
    first_document = row.position_ids[1:].tolist().index(0) + 1 if 0 in row.position_ids[1:] else len(row.input_ids)
    probe = torch.from_numpy(row.input_ids[: min(first_document, PROBE_TOKENS)]).unsqueeze(0)
    positions = torch.arange(probe.shape[1]).unsqueeze(0)
    logits = trainer.float32_logits(probe, positions)
    tensors = {"input_ids": probe, "logits": logits.contiguous()}
    adapters = {"adapter": trainer.trained_weights()} if run.method.adapters else {}
    if trainer.ema:
        with trainer.ema.in_place():
            tensors["ema_logits"] = trainer.float32_logits(probe, positions).contiguous()
            if run.method.adapters:
                # in one process they are the parameters themselves
                adapters["adapter_ema"] = {n: tensor.clone() for n, tensor in trainer.trained_weights().items()}
    if not trainer.is_main:
        return
    for name, weights in adapters.items():
        assert trainer.weights.method.adapters
        with atomic_directory(args.output / name) as adapter:
            settings = trainer.weights.method.adapters  # with the targets that this model has
            save_adapter(adapter, settings, weights, str(run.model.source), trainer.weights.tied)
    with atomic_file(args.output / "probe.safetensors") as file:
        save_file(tensors, file)
    best: dict[str, Any] | None = None
    if run.train.checkpoint.keep_best and (path := best_checkpoint(trainer.checkpoints, trainer.validation_losses)):
        loss = trainer.validation_losses[step_of(path)]
        best = {"checkpoint": f"checkpoints/{path.name}", "step": step_of(path), "validation_loss": loss}
    records = trainer.metrics.records
    with atomic_file(args.output / "metrics.jsonl") as file:
        shutil.copyfile(trainer.metrics.path, file)
    last = records[-1]
    write_json(
        args.output / "summary.json",
        {
            "method": run.method.name,
            "steps": trainer.step,
            "loss": last["loss"],
            "validation_loss": trainer.validation_losses.get(trainer.step),
            "num_tokens": sum(r["num_tokens"] for r in records),
            "num_label_tokens": sum(r["num_label_tokens"] for r in records),
            "seconds": round(sum(r["step_seconds"] + r["data_seconds"] for r in records), 2),
            "tokens_per_second": median(r["tokens_per_second"] for r in records),
            "peak_memory_gib": max(r["peak_memory_gib"] for r in records),
            "world_size": trainer.dims.world_size,
            "parallelism": run.parallelism.model_dump(),
            "trainable_parameters": trainer.trainable_parameters,
            "total_parameters": trainer.total_parameters,
            "checkpoint": f"checkpoints/step_{trainer.step}",
            "best_checkpoint": best,
            "checkpoint_seconds": round(trainer.checkpoint_seconds, 3),
            "seed": run.seed,
            **({"mix": mix} if mix else {}),
            **({"attempts": tries} if (tries := attempts.Attempts(args.output).all()) else {}),
            "provenance": clock.provenance(identity=trainer.identity),
        },
    )


def identity(run: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """What decides the weights: the keys on which a checkpoint must agree to be continued."""
    config = run.resolved()
    kept = {name: value for name, value in config["train"].items() if name not in FREE_TO_CHANGE["train"]}
    return {
        "seed": run.seed,
        "method": run.method.used(),
        **({"teacher": sha256_json(read_json(args.teacher / "manifest.json")["files"])} if args.teacher else {}),
        "train": kept,
        "model": {"store": args.model.name if args.model else None, "architecture": config["model"]["architecture"]},
        "tokens": {
            "store": args.tokens.name,
            **({"weights": run.data.weights, "source": run.data.source} if run.data.weights else {}),
        },
    }


def _read_run(args: argparse.Namespace) -> RunConfig:
    import json

    if not (args.tokens / "manifest.json").is_file():
        raise ConfigError(f"--tokens {args.tokens} has no manifest.json: run the tokenize stage first")
    run = RunConfig.model_validate_json(json.dumps(read_config(args.config)))
    if run.method.name == "none":
        raise ConfigError("method.name is none: this run is not trained; choose full, lora or pretrain")
    if (run.method.name == "kd") != (args.teacher is not None):
        raise ConfigError(f"method.name is {run.method.name}: --teacher belongs to kd, and only to it")
    if args.teacher is not None and not (args.teacher / "manifest.json").is_file():
        raise ConfigError(f"--teacher {args.teacher} has no manifest.json: finish the stage that makes it first")
    if args.model is None and run.model.architecture is None:
        raise ConfigError("--model is missing: give store/models/KEY, or set model.architecture for random weights")
    return run


if __name__ == "__main__":
    sys.exit(main())
