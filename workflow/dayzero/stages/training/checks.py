"""What can be said before any process starts: machine, sizes, rows and model held against one another.

Everything here raises `ConfigError`.
"""

from __future__ import annotations

import argparse

import torch

from dayzero.config import Method, RunConfig
from dayzero.data.loader import check_rows
from dayzero.data.tokenizer import check_same_tokens
from dayzero.data.tokens import TokenRows
from dayzero.engine.distillation import check_vocabularies
from dayzero.engine.expert_parallel import check_expert_parallel
from dayzero.engine.float8 import convert_to_float8, require_float8
from dayzero.engine.kernels import require_kernels
from dayzero.engine.loss_choice import choose_loss
from dayzero.engine.megatron_fsdp import check_megatron_fsdp, require_megatron_fsdp
from dayzero.engine.model import build_model
from dayzero.engine.optimizer import require_optimizer
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.pipeline_cut import check_pipeline
from dayzero.engine.quantized import require_qlora
from dayzero.engine.router_loss import router_loss_coefficient
from dayzero.engine.tensor_parallel import tensor_parallel_plan
from dayzero.engine.token_split import require_context_parallel
from dayzero.errors import ConfigError
from dayzero.files import read_json
from dayzero.pretrained import context_length
from dayzero.stages.training.inputs import model_source, teacher_source


def check_all(run: RunConfig, args: argparse.Namespace) -> None:
    """Check the machine, then sizes, then rows, then the model without its weights."""
    dims = ParallelDims(world_size=run.parallelism.world_size, **run.parallelism.model_dump())
    require_strategy_and_method(run)
    require_kernels(run.train)
    require_optimizer(run.train.optimizer)
    if run.train.fp8:
        require_float8(run.train.fp8)
    dims.grad_accum_steps(run.train.global_batch_size, run.train.local_batch_size)
    check_rows(TokenRows(args.tokens / "train", run.tokenize.seq_len), dims.dp)
    if run.train.checkpoint.keep_best and not (args.tokens / "validation").is_dir():
        raise ConfigError(
            f"train.checkpoint.keep_best {run.train.checkpoint.keep_best} needs a validation loss, but {args.tokens} "
            "has no validation rows: hold some out (data.validation_size), or set keep_best to 0"
        )
    _check_tokens(run, args)
    asks_the_model = (
        run.method.adapters
        or run.method.freeze
        or run.train.router_aux_loss_coef
        or run.train.fp8
        or run.train.loss not in ("auto", "chunked", "cross_entropy")
        or args.teacher
        or dims.pp > 1
        or dims.ep > 1
        or dims.tp > 1
        or dims.cp > 1
        or dims.strategy == "megatron_fsdp"
    )
    if asks_the_model:
        _check_model(run, args, dims)


def require_strategy_and_method(run: RunConfig) -> None:
    """What only some machines can train; each rank asks too, since torchrun may have been started by hand."""
    if run.parallelism.strategy == "megatron_fsdp":
        require_megatron_fsdp()
    if run.method.name == "qlora":
        require_qlora()


def _check_tokens(run: RunConfig, args: argparse.Namespace) -> None:
    """Hold the token rows against the model's context and vocabulary, and the teacher's tokenizer."""
    config = model_source(run, args).config(args.tokenizer)
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
    if args.teacher:
        name, trust = str(run.method.kd.teacher), run.model.trust_remote_code
        check_same_tokens(args.tokenizer or args.model, args.teacher, name, trust)


def _check_model(run: RunConfig, args: argparse.Namespace, dims: ParallelDims) -> None:
    """Hold what the config says of layers, modules and experts against the model without weights."""
    source = model_source(run, args)
    model = build_model(source, source.config(args.tokenizer), run.method, run.seed, meta=True)
    router_loss_coefficient(model, run.train.router_aux_loss_coef, dims)
    choose_loss(model, run.train, dims, cuda=torch.cuda.is_available())
    if of_teacher := teacher_source(run, args):
        teacher = build_model(of_teacher, of_teacher.config(), Method(name="none"), 0, meta=True)
        check_vocabularies(model, teacher, str(run.method.kd.teacher))
        if dims.cp > 1:
            require_context_parallel(teacher, dims.cp, dims.cp_method)
        if dims.tp > 1:
            tensor_parallel_plan(teacher, dims.tp, sequence_parallel=dims.sequence_parallel)
    if dims.strategy == "megatron_fsdp":
        check_megatron_fsdp(model)
    if run.train.fp8:
        convert_to_float8(model, run.train.fp8)
    if dims.cp > 1:
        require_context_parallel(model, dims.cp, dims.cp_method)
    if dims.ep > 1:
        check_expert_parallel(model, dims.ep)
    if dims.pp > 1:
        check_pipeline(model, dims)
    if dims.tp > 1:
        tensor_parallel_plan(model, dims.tp, sequence_parallel=dims.sequence_parallel)
