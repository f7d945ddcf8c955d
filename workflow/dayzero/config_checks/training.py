"""Steps, optimizer, loss, memory and kernels of training."""

from __future__ import annotations

from collections.abc import Iterator

from dayzero.config import LrScheduler, RunConfig


def check_steps_and_optimizer(run: RunConfig) -> Iterator[tuple[str, str]]:
    train, scheduler = run.train, run.train.lr_scheduler
    if train.max_steps is None and train.num_epochs is None:
        yield "train.max_steps", "nothing says how long to train: set train.max_steps or train.num_epochs"
    if train.max_steps is not None and train.num_epochs is not None:
        yield (
            "train.max_steps",
            f"and train.num_epochs = {train.num_epochs:g} both say how long to train: set one of them to null",
        )
    if train.max_steps is not None and (problem := too_long(scheduler, train.max_steps)):
        yield "train.lr_scheduler.warmup_steps", f"{problem} is more than train.max_steps {train.max_steps}"
    if not all(0 <= beta < 1 for beta in train.optimizer.betas):
        yield "train.optimizer.betas", "both must be at least 0 and below 1"
    weights = "bfloat16" if train.precision == "bf16_pure" else "float32"
    if train.optimizer.implementation != "auto" and train.optimizer.state_dtype != weights:
        yield (
            "train.optimizer.implementation",
            f"moments in {train.optimizer.state_dtype} (state_dtype) of weights in {weights} are not for torch's "
            f"{train.optimizer.implementation} AdamW: use auto",
        )
    if train.checkpoint.keep_best and (problem := _no_validation_at_checkpoints(run)):
        yield "train.checkpoint.keep_best", problem


def too_long(scheduler: LrScheduler, steps: int) -> str | None:
    """The parts of the learning rate's curve that do not fit into `steps`."""
    decay = (scheduler.decay_steps or 0) if scheduler.name == "wsd" else 0
    if scheduler.warmup_steps + decay <= steps:
        return None
    return f"warmup_steps {scheduler.warmup_steps}" + (f" + decay_steps {decay}" if decay else "")


def _no_validation_at_checkpoints(run: RunConfig) -> str | None:
    every, validate_every = run.train.checkpoint.every, run.train.validate_every
    if not run.data.validation_size and not run.data.validation_source:
        return "needs a validation loss, but data.validation_size is 0: hold rows out, or set keep_best to 0"
    if not every or not validate_every:
        name = "validate_every" if every else "checkpoint.every"
        return f"only the last step to choose from, since train.{name} is 0: set it, or keep_best to 0"
    if left := every % validate_every:
        return (
            f"needs a validation loss at each checkpoint, but train.checkpoint.every {every} % train.validate_every "
            f"{validate_every} = {left}, must be 0: use a multiple of {validate_every}"
        )
    return None


def check_loss(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Losses that the parallelism cannot do; what the machine and the model cannot is said when they are known."""
    loss, sizes = run.train.loss, run.parallelism
    if loss == "loss_parallel" and sizes.tp == 1:
        yield "train.loss", "splits the vocabulary over the ranks of parallelism.tp, which is 1: set tp, or use auto"
    if loss in ("cut_cross_entropy", "liger_fused", "loss_parallel"):
        if sizes.pp > 1:
            yield "train.loss", f"does not go with parallelism.pp {sizes.pp}: use auto or chunked, or set pp 1"
        if sizes.strategy == "megatron_fsdp":
            yield "train.loss", "does not go with parallelism.strategy megatron_fsdp: use auto or chunked, or fsdp2"
    if loss == "cut_cross_entropy" and run.train.z_loss:
        yield "train.z_loss", "does not go with train.loss cut_cross_entropy: use auto, chunked or liger_fused"


def check_memory_and_kernels(run: RunConfig) -> Iterator[tuple[str, str]]:
    train, sizes = run.train, run.parallelism
    if run.train.compile and run.parallelism.pp_schedule == "zero_bubble":
        yield "train.compile", "does not go with pp_schedule zero_bubble, which splits backward passes: turn one off"
    if sizes.strategy != "fsdp2":
        for key, value in (("cpu_offload", train.cpu_offload), ("precision", train.precision == "bf16_pure")):
            if value:
                said = "bf16_pure" if key == "precision" else "true"
                yield f"train.{key}", f"{said} is FSDP2's, but parallelism.strategy is {sizes.strategy}: use fsdp2"
    if train.cpu_offload and run.method.name == "kd":
        yield "train.cpu_offload", "is not tried with the teacher of method.name kd: turn it off"
    if train.attention in ("documents", "varlen"):
        if sizes.cp > 1:
            yield "train.attention", f"parallelism.cp {sizes.cp} has its own attention: use auto"
        if sizes.pp > 1:
            yield "train.attention", f"{train.attention} is not tried with parallelism.pp {sizes.pp}: use auto or sdpa"
        if train.compile and train.attention == "documents":
            yield "train.attention", "documents would be compiled anew for each batch: use sdpa or no compile"
    elif train.attention != "auto" and sizes.cp > 1:
        yield "train.attention", f"parallelism.cp {sizes.cp} has its own attention: use auto"
    if train.kernels == "liger" and sizes.tp > 1:
        yield "train.kernels", f"Liger's norms cannot be split by parallelism.tp {sizes.tp}: use auto"


def check_fp8(run: RunConfig) -> Iterator[tuple[str, str]]:
    train, sizes, fp8 = run.train, run.parallelism, run.train.fp8
    if fp8 is None:
        return
    if sizes.strategy not in ("fsdp2", "none"):
        yield "train.fp8", f"is not tried with parallelism.strategy {sizes.strategy}: use fsdp2"
    for axis in ("tp", "pp", "ep"):
        if (size := getattr(sizes, axis)) > 1:
            yield "train.fp8", f"is not tried with parallelism.{axis} {size}: use dp_shard, or set it to null"
    if run.method.name == "qlora":
        yield "train.fp8", "the base weights of method.name qlora have 4 bits already: use lora, or set it to null"
    if run.method.adapters and run.method.lora.dora:
        yield "train.fp8", "method.lora.dora reads whole weights, of which 8 bits are left: turn one off"
    torchao = fp8.backend == "torchao"
    recipes = ("tensorwise", "rowwise") if torchao else ("tensorwise", "delayed", "block", "mxfp8")
    if fp8.recipe not in recipes:
        yield "train.fp8.recipe", f"backend {fp8.backend} has {', '.join(recipes)}: use one of them"
    if not torchao:
        for key in ("all_gather", "emulate"):
            if getattr(fp8, key):
                yield f"train.fp8.{key}", "is backend torchao's: turn it off"
        if train.activation_checkpointing != "none":
            yield (
                "train.activation_checkpointing",
                "computes again without transformer_engine's scales: use none, or train.fp8.backend torchao",
            )
        if train.compile:
            yield "train.compile", "is not tried with train.fp8.backend transformer_engine: turn it off"
    if train.precision == "fp32" and not fp8.emulate:
        yield "train.fp8", "multiplies into bfloat16, but train.precision is fp32: use bf16"
    if torchao and fp8.all_gather and (fp8.recipe != "tensorwise" or sizes.strategy != "fsdp2" or train.cpu_offload):
        yield (
            "train.fp8.all_gather",
            f"needs recipe tensorwise, strategy fsdp2 and no cpu_offload, but they are {fp8.recipe}, {sizes.strategy} "
            f"and {train.cpu_offload}: turn it off",
        )
