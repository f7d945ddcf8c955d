"""The training loop. It knows batches and a place for its files; not where either comes from.

The loss of a step is the sum of token losses over the global batch (all ranks and micro-batches) divided by the global
number of label tokens, plus the auxiliary loss of a mixture of experts if that is on: what is logged is exactly what is
optimised, and it does not depend on how rows are dealt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dayzero.config import Method, Train
from dayzero.console import ProgressBar, log
from dayzero.engine import checkpoint, distributed
from dayzero.engine.checkpoint_writer import CheckpointWriter
from dayzero.engine.context_parallel import ContextParallel, use_context_parallel
from dayzero.engine.device_peaks import peak_flops
from dayzero.engine.distillation import Distillation, build_teacher, check_vocabularies
from dayzero.engine.ema import Ema
from dayzero.engine.expert_parallel import average_expert_gradients
from dayzero.engine.float8 import convert_to_float8, frozen_float8
from dayzero.engine.flops import StepFlops, count_flops
from dayzero.engine.frozen import in_float32, keep_frozen_in_bf16
from dayzero.engine.kernels import use_attention, use_fused_kernels
from dayzero.engine.lora import warn_of_frozen_experts
from dayzero.engine.lora_targets import not_adapted
from dayzero.engine.loss import IGNORE, CausalLMWithLoss, LossOptions
from dayzero.engine.loss_choice import LossChoice, choose_loss
from dayzero.engine.lr_scheduler import lr_factor
from dayzero.engine.megatron_fsdp import adapt_optimizer, has_unequal_shards, require_gradients, whole_parameters
from dayzero.engine.metrics import MetricsLog, peak_memory_gib
from dayzero.engine.model import ModelSource, count_parameters, share_trained_weights, share_weights
from dayzero.engine.optimizer import build_optimizer, clip_grad_norm, set_lr
from dayzero.engine.packing import architecture_leak, packing_leak, reads_ahead
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallelize import parallelize
from dayzero.engine.pipeline_cut import Anatomy, anatomy
from dayzero.engine.precision import autocast, computes_in_bf16, weights_dtype
from dayzero.engine.router_loss import RouterLoss, router_loss_coefficient
from dayzero.engine.signals import StopRequest
from dayzero.engine.structure import find_layers
from dayzero.engine.tensor_parallel import pad_tokens, sum_partial_gradients
from dayzero.engine.tiny_copy import mixes_dtypes
from dayzero.engine.transformer_engine import float8_autocast
from dayzero.engine.weights import Weights
from dayzero.errors import ConfigError


class Batch(Protocol):
    """One rank's share of a global batch (see the data room's loader)."""

    @property
    def step(self) -> int: ...
    @property
    def epoch(self) -> float: ...
    @property
    def micro_batches(self) -> list[dict[str, Tensor]]: ...
    @property
    def row_ids(self) -> list[int]: ...
    @property
    def num_label_tokens(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...


class Interrupted(Exception):
    """Training was asked to stop and has written a checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped as asked after step {step}; a checkpoint is written: start again to continue")


class NonFiniteLoss(ValueError):
    """The loss or the gradient norm is NaN or infinite; the optimizer has not stepped."""


@dataclass(kw_only=True)
class Trainer:
    """One rank's model, optimizer and step; built identically on every rank.

    `identity` is what a checkpoint must agree with to be continued; `directory` holds `checkpoints/`.
    """

    source: ModelSource
    tokenizer_directory: Path | None
    method: Method
    train: Train
    dims: ParallelDims
    seed: int
    device: torch.device
    directory: Path
    identity: dict[str, Any]
    teacher: ModelSource | None = None
    """Whom the model learns from; for method kd."""
    max_steps: int = 0
    """Optimizer steps in all; set before `fit`."""
    step: int = 0
    """Optimizer steps done."""
    validation_losses: dict[int, float] = field(default_factory=dict)
    attention: str = "context parallel"
    """Which attention train.attention came to."""
    fused_kernels: bool = False
    """Whether the model runs with Liger's kernels."""
    checkpoint_seconds: float = 0.0
    """How long this process's training has stood still for checkpoints."""

    def __post_init__(self) -> None:
        # from headers alone, on every rank alike: a model that cannot be loaded is said before any waits for another
        config = self.source.config(self.tokenizer_directory)
        self.weights = Weights(self.source, config, self.method, self.seed, dtype=weights_dtype(self.train.precision))
        self.context: ContextParallel | None = None
        if self.dims.cp > 1:
            self.context = ContextParallel(self.dims.build_cp_mesh(self.device.type).get_group(), self.dims.cp_method)
        self.anatomy: Anatomy | None = None
        self.mesh = None if self.dims.strategy == "none" else self.dims.build_mesh(self.device.type)
        self.loss_choice: LossChoice | None = None
        self.distillation: Distillation | None = None
        if self.teacher is not None:
            teacher = build_teacher(self.teacher, self.train, self.dims, self.mesh, self.device)
            check_vocabularies(self.weights.template, teacher.model, str(self.method.kd.teacher))
            self.distillation = Distillation(teacher, self.method.kd)
        bare = self._empty_module()
        model = bare.model
        self.vocab_size: int = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        self.trainable_parameters, self.total_parameters = count_parameters(model)
        if self.method.adapters and self.is_main:
            warn_of_frozen_experts(model, self.method.adapters)
            if left := not_adapted(self.weights.template, self.weights.method):
                log.warning("method.lora.targets all-linear: an adapter does nothing on %s: left out", ", ".join(left))
        self.peak_flops = peak_flops(self.device, self.train.precision)
        self.flops: StepFlops | None = (
            count_flops(self.weights.empty_model(quantized=False)) if self.peak_flops else None
        )
        self.mixes_dtypes = computes_in_bf16(self.train.precision) and mixes_dtypes(self.weights.template)
        """Whether bf16 needs autocast under FSDP2 too, which casts parameters but not buffers."""
        self.router_loss = bare.router_loss
        self.router_coefficient = router_loss_coefficient(model, self.train.router_aux_loss_coef, self.dims)
        load = partial(self.weights.load, bare, model, self.device, offload=self.train.cpu_offload)
        self.module, self.partial, self.pipeline = parallelize(
            bare, self.dims, self.mesh, self.train, load, self.anatomy
        )
        self.copies = self.pipeline.copies_here() if self.pipeline else frozenset[int]()
        self.optimizer = build_optimizer(self.module, self.train.optimizer, copies=self.copies)
        if has_unequal_shards(self.module):
            adapt_optimizer(self.optimizer)
        self.ema = Ema(self.module, self.train.ema.decay) if self.train.ema else None
        self.metrics = MetricsLog(self.checkpoints / "metrics.jsonl", enabled=self.is_main)
        self.writer = CheckpointWriter(self.checkpoints, self.train.checkpoint)

    def _empty_module(self, *, plain: bool = False) -> CausalLMWithLoss:
        """The model with its loss, on the meta device; a `plain` one without fused kernels and 8-bit products."""
        model = self.weights.empty_model()
        if self.train.precision == "bf16" and self.dims.strategy == "fsdp2":
            keep_frozen_in_bf16(model, self.weights.stored_dtype)
        if self.dims.pp > 1 and self.anatomy is None:
            self.anatomy = anatomy(model, self.dims.pp)
        if self.dims.cp > 1:
            use_context_parallel(model, self.dims.cp, self.dims.cp_method)
        else:
            self.attention = use_attention(model, self.train, self.dims)
        if not plain:
            self.fused_kernels = use_fused_kernels(model, self.train, self.dims)
            if self.train.fp8:
                convert_to_float8(model, self.train.fp8)
        router_loss = None
        if router_loss_coefficient(model, self.train.router_aux_loss_coef, self.dims):
            router_loss = RouterLoss(model, self.context.group if self.context else None)
        if self.loss_choice is None:
            # a teacher's loss goes through both models' own heads
            train = self.train.model_copy(update={"loss": "chunked"}) if self.distillation else self.train
            self.loss_choice = choose_loss(model, train, self.dims, cuda=self.device.type == "cuda")
            if self.is_main:
                reason = "with a teacher's" if self.distillation else self.loss_choice.reason
                log.info("loss: %s (%s)", self.loss_choice.name, reason)
        options = LossOptions(
            chunk_size=self.train.loss_chunk_size,
            z_loss=self.train.z_loss or 0.0,
            group=self.mesh.get_group("tp") if self.mesh is not None and self.dims.tp > 1 else None,
        )
        loss = self.distillation.loss if self.distillation else self.loss_choice.function
        return CausalLMWithLoss(model, loss=loss, options=options, router_loss=router_loss)

    @property
    def is_main(self) -> bool:
        return distributed.rank() == 0

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def _names_of_copies(self) -> dict[str, str]:
        return {copy: name for name, copy in self.pipeline.copies} if self.pipeline else {}

    def _averages(self) -> dict[str, Tensor]:
        return self.ema.state(self._names_of_copies) if self.ema else {}

    def resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        if self.is_main:
            checkpoint.remove_unfinished(self.checkpoints)
        distributed.barrier()
        found = checkpoint.checkpoints(self.checkpoints)
        if found:
            saved = checkpoint.check_identity(found[-1], self.identity)
            copies = self._names_of_copies
            checkpoint.load_checkpoint(found[-1], self.module, self.optimizer, copies, self._averages())
            if self.ema:
                self.ema.loaded(copies)
            self.step = saved["step"]
            self.validation_losses = {int(k): v for k, v in saved["validation_losses"].items()}
            if self.is_main:
                log.info("continuing from %s", found[-1])

    def fit(self, batches: Callable[[int], Iterable[Batch]], validation: Callable[[], Iterable[Batch]] | None) -> None:
        """Train from `step` to `max_steps`. `batches(step)` yields this rank's batches from that step on.

        Raises `NonFiniteLoss`, `CheckpointFailed`, and `Interrupted` after SIGTERM or SIGUSR1 once a checkpoint is
        written.
        """
        self.metrics.start_after(self.step)
        waited = 0.0  # for the checkpoint before this step
        with (
            StopRequest() as stop,
            self.writer,
            ProgressBar("train", self.max_steps, initial=self.step, enabled=self.is_main) as progress,
        ):
            waiting_since = time.perf_counter()
            for batch in batches(self.step) if self.step < self.max_steps else ():
                started = time.perf_counter()
                record, stop_asked = self.train_step(batch, stop.asked or self.writer.failed)
                self.step = batch.step + 1
                last = self.step == self.max_steps
                seconds = time.perf_counter() - started
                peak = (record.pop("flops"), self.peak_flops)
                record |= speed(record["num_tokens"], seconds, started - waiting_since, self.dims.world_size, *peak)
                record |= {"peak_memory_gib": peak_memory_gib(self.device), "checkpoint_seconds": waited}
                if validation and (last or (self.train.validate_every and self.step % self.train.validate_every == 0)):
                    record["validation_loss"] = self.validation_losses[self.step] = self.validate(validation())
                self.metrics.write(record)
                progress.advance(loss=record["loss"], tokens_per_second=round(record["tokens_per_second"]))
                every, waited = self.train.checkpoint.every, 0.0
                if last or stop_asked or (every and self.step % every == 0):
                    waited = self.save(wait=last or stop_asked)
                if stop_asked and not last:
                    raise Interrupted(self.step)
                waiting_since = time.perf_counter()

    def train_step(self, batch: Batch, stop: bool = False) -> tuple[dict[str, Any], bool]:
        """One optimizer step; returns its record and whether any rank was asked to stop."""
        step = batch.step + 1
        # every step has its own seed, so a resumed run needs no saved RNG state
        torch.manual_seed((self.seed * 1_000_003 + step) * 1_009 + self.dims.seed_rank(distributed.rank()))
        lr = self.train.optimizer.lr * lr_factor(step, self.max_steps, self.train.lr_scheduler)
        set_lr(self.optimizer, lr)
        rows = sum(int((m["lengths"] > 0).sum()) for m in batch.micro_batches)
        flops = self.flops.of_batch(batch.micro_batches, batch.num_label_tokens) if self.flops else 0.0
        counts: list[float] = [batch.num_label_tokens, batch.num_tokens, rows, stop, flops]
        num_labels, num_tokens, num_rows, stops, flops = self._sum_over_rows(counts)
        # FSDP2 and DDP average gradients over ranks; the loss is a sum over ranks
        scale = self.dims.dp * self.dims.cp / max(num_labels, 1)
        # a mean over rows, written as a part of the sum that is divided by the label tokens
        router_weight = self.router_coefficient * max(num_labels, 1) / num_rows
        loss_sum = self._backward(batch.micro_batches, scale, router_weight)
        loss_value = self._sum_over_tokens(loss_sum) / max(num_labels, 1)
        if has_unequal_shards(self.module):
            require_gradients(self.module)
        if self.partial:
            assert self.mesh is not None
            sum_partial_gradients(self.partial, self.mesh.get_group("tp"))
        if self.dims.ep > 1:
            average_expert_gradients(self.module.parameters(), self.dims.ep)
        stages = self.pipeline.group if self.pipeline else None
        grad_norm = clip_grad_norm(
            self.module.parameters(), self.train.max_grad_norm, copies=self.copies, across=stages
        )
        if not (math.isfinite(loss_value) and math.isfinite(grad_norm)):
            raise NonFiniteLoss(
                f"loss {loss_value} and gradient norm {grad_norm} at step {step}, source rows {batch.row_ids}: inspect "
                "those rows, lower the learning rate, or train in fp32; earlier checkpoints are kept"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update()
        record = {"step": step, "epoch": batch.epoch, "loss": loss_value, "grad_norm": grad_norm, "lr": lr}
        if self.router_loss:
            record["router_aux_loss"] = self._sum_over_tokens(self.router_loss.take_sum()) / num_rows
        if self.distillation:
            record["kl"] = self._sum_over_tokens(self.distillation.take_sum()) / max(num_labels, 1)
        record |= {"num_label_tokens": int(num_labels), "num_tokens": int(num_tokens), "flops": flops}
        return record, stops > 0

    def _backward(self, micro_batches: list[dict[str, Tensor]], scale: float, router_weight: float) -> float:
        """Gradients of `scale` times the summed loss of all `micro_batches`; returns the share of the sum seen here."""
        if self.pipeline:
            return self.pipeline.train(micro_batches, scale, self.context)
        # summed on the device: reading every loss would let it idle between micro-batches
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, micro_batch in enumerate(micro_batches):
            with self._gradient_sync(last=index == len(micro_batches) - 1):
                loss = self._loss_sum(micro_batch, router_weight)
                (loss * scale).backward()
            loss_sum += loss.detach()
        if self.distillation:
            self.distillation.teacher.reshard()
        return loss_sum.item()

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> float:
        """Mean loss of a label token over all validation rows, without auxiliary losses."""
        self.module.eval()
        loss_sum = num_labels = 0.0
        for batch in batches:
            loss_sum += sum(self._loss_sum(m).item() for m in batch.micro_batches)
            num_labels += batch.num_label_tokens
        self.module.train()
        return self._sum_over_tokens(loss_sum) / max(self._sum_over_rows([num_labels])[0], 1)

    def save(self, *, wait: bool) -> float:
        """Checkpoint the present step; with `wait` it is complete on return. Returns the seconds that took here."""
        started = time.perf_counter()
        trainer = {"identity": self.identity, "validation_losses": dict(self.validation_losses)}
        state = checkpoint.state_of(
            self.module, self.optimizer, self._names_of_copies, more=self._averages(), for_saving=True
        )
        self.writer.save(self.step, state, trainer)
        if wait:
            self.writer.wait()
        seconds = time.perf_counter() - started
        self.checkpoint_seconds += seconds
        return seconds

    @torch.no_grad()
    def logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[B, T] twice -> [B, T, V] on the CPU, float32, as computed in training. All ranks call it together."""
        return self._logits(self.module, input_ids, position_ids, self.train.precision)

    @torch.no_grad()
    def float32_logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """`logits` of the same weights on the same mesh, but computed in float32 whatever the precision of training.

        What an export must give: bf16 training keeps float32 weights, and only their float32 logits can be compared
        closely.
        """
        module = self.module
        if self.train.fp8 or (self.train.precision != "fp32" and self.dims.strategy == "fsdp2"):
            changed = {"precision": "fp32", "activation_checkpointing": "none", "compile": False}
            bare = self._empty_module(plain=True)
            module, _, _ = parallelize(
                bare,
                self.dims,
                self.mesh,
                self.train.model_copy(update=changed),
                load=lambda: self._share_weights(bare),
                found=self.anatomy,
            )
            with in_float32(bare, [] if self.pipeline else list(find_layers(bare.model))):
                return self._logits(module, input_ids, position_ids, "fp32")
        return self._logits(module, input_ids, position_ids, "fp32")

    def _share_weights(self, bare: CausalLMWithLoss) -> None:
        """Give `bare` the weights of training; frozen ones that were quantised are loaded once more."""
        if frozen_float8(self.module):
            self.weights.load(bare, bare.model, self.device, offload=self.train.cpu_offload)
            share_trained_weights(bare, self.module)
        else:
            share_weights(bare, self.module)

    def _logits(self, module: nn.Module, input_ids: Tensor, position_ids: Tensor, precision: str) -> Tensor:
        module.eval()
        logits = self._forward(module, precision, input_ids, None, position_ids)
        module.train()
        return logits.float().cpu()

    def require_causal(self) -> None:
        """Raise `ConfigError` where the model sees the tokens that it is to predict."""
        precision = "bf16" if computes_in_bf16(self.train.precision) else "fp32"
        moved = reads_ahead(self.logits, self.vocab_size, precision)
        if moved is not None:
            name = type(self.weights.template).__name__
            raise ConfigError(
                f"model: {name} reads later tokens (changing them moves earlier logits by {moved:.2g}), so it would "
                "learn to copy what it should predict: choose a model that reads from left to right, or, where its "
                "config has is_decoder, set that"
            )

    def packing_leak(self) -> float | None:
        """How far packed documents reach into one another in this model, or in its teacher, see `packing.py`; None if
        they do not."""
        precision = "bf16" if computes_in_bf16(self.train.precision) else "fp32"
        leak = packing_leak(self.logits, self.vocab_size, precision)
        if leak is None:
            leak = architecture_leak(self.weights.template, self.attention)
        if leak is None and self.distillation:
            leak = packing_leak(self._teacher_logits, self.vocab_size, precision)
        return leak

    def _teacher_logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        assert self.distillation is not None
        logits = self.distillation.teacher.all_logits
        return self._forward(logits, self.train.precision, input_ids, None, position_ids).float().cpu()

    def trained_weights(self) -> dict[str, Tensor]:
        """Every trained parameter whole, by the model's own names, on rank 0's CPU; empty on other ranks."""
        return self._whole_weights(frozen=False)

    def all_weights(self) -> dict[str, Tensor]:
        """`trained_weights` and the frozen ones."""
        return self._whole_weights(frozen=True)

    def _whole_weights(self, *, frozen: bool) -> dict[str, Tensor]:
        if has_unequal_shards(self.module):
            # none is frozen
            return {name.removeprefix("model."): whole for name, whole in whole_parameters(self.module).items()}
        options = StateDictOptions(
            full_state_dict=True, cpu_offload=self.pipeline is None, ignore_frozen_params=not frozen
        )
        state = cast(dict[str, Tensor], get_model_state_dict(self.module, options=options))
        if self.pipeline:
            state = self.pipeline.collect(state)
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}

    def _sum_over_rows(self, values: list[float]) -> list[float]:
        """Sum over the ranks that see different rows."""
        copies = self.dims.world_size // self.dims.dp
        return [value / copies for value in distributed.all_reduce_sum(values, self.device)]

    def _sum_over_tokens(self, value: float) -> float:
        """Sum over the ranks that see different tokens."""
        return distributed.all_reduce_sum([value], self.device)[0] / self.dims.tp

    def _loss_sum(self, micro_batch: dict[str, Tensor], router_weight: float = 0.0) -> Tensor:
        rows = micro_batch["input_ids"], micro_batch["labels"], micro_batch["position_ids"]
        real_tokens = torch.arange(rows[0].shape[1]) < micro_batch["lengths"].unsqueeze(1) if router_weight else None
        return self._forward(self.module, self.train.precision, *rows, real_tokens, router_weight)

    def _forward(
        self,
        module: Callable[..., Tensor],
        precision: str,
        input_ids: Tensor,
        labels: Tensor | None,
        position_ids: Tensor,
        real_tokens: Tensor | None = None,
        router_weight: float = 0.0,
    ) -> Tensor:
        """[B, T] rows, on any device -> this rank's summed loss, or without labels all logits [B, T, V]."""
        multiple, tokens = self.dims.token_multiple, input_ids.shape[1]
        inputs = [
            pad_tokens(input_ids, multiple, 0),
            None if labels is None else pad_tokens(labels, multiple, IGNORE),
            pad_tokens(position_ids, multiple, None),
            None if real_tokens is None else pad_tokens(real_tokens, multiple, False),
        ]
        if self.context:
            self.context.enter(cast(Tensor, inputs[2]).to(self.device))
            inputs = [None if x is None else self.context.split(x) for x in inputs]
        inputs = [None if x is None else x.to(self.device, non_blocking=True) for x in inputs]
        real_tokens = inputs.pop()
        router = {} if real_tokens is None else {"real_tokens": real_tokens, "router_weight": router_weight}
        fp8 = self.train.fp8 if module is self.module else None  # else: logits in float32
        with (
            autocast(precision, "none" if self.mixes_dtypes else self.dims.strategy, self.device),
            float8_autocast(fp8),
        ):
            output = module(*inputs, **router)
        if labels is not None:
            return output
        return (self.context.join(output) if self.context else output)[:, :tokens]

    def _gradient_sync(self, *, last: bool) -> Any:
        """Reduce gradients over ranks in the last micro-batch only.

        Under FSDP2 that keeps the whole gradient on every rank meanwhile, which is small for adapters; with all weights
        trained each micro-batch is reduced to its shard at once.
        """
        if self.dims.strategy == "ddp" and not last:
            return cast(DistributedDataParallel, self.module).no_sync()
        if self.dims.strategy == "fsdp2" and self.method.adapters:
            cast(FSDPModule, self.module).set_requires_gradient_sync(last)
        return nullcontext()


def speed(
    num_tokens: int, seconds: float, data_seconds: float, world_size: int, flops: float, peak: float | None
) -> dict[str, float | None]:
    """The timing keys of metrics.jsonl; tokens a second and mfu count the wait for data.

    `flops`: operations that the step needs on all ranks; `peak`: those a second that one device can do, if known.
    """
    whole = max(seconds + data_seconds, 1e-9)
    rate = num_tokens / whole
    return {
        "tokens_per_second": rate,
        "tokens_per_second_per_gpu": rate / world_size,
        "mfu": flops / (whole * world_size * peak) if peak else None,
        "step_seconds": seconds,
        "data_seconds": data_seconds,
    }
