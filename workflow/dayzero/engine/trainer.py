"""The training loop. It knows batches and a place for its files; not where either comes from.

What is trained is a `ParallelModel`; what it does with a rank's rows stands in `passes.py`.

The loss of a step is the sum of token losses over the global batch (all ranks and micro-batches) divided by the global
number of label tokens, plus the auxiliary loss of a mixture of experts if that is on: what is logged is exactly what is
optimised, and it does not depend on how rows are dealt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dayzero.checkpoint_files import checkpoints
from dayzero.console import ProgressBar, log
from dayzero.engine import checkpoint, distributed
from dayzero.engine.checkpoint_writer import CheckpointWriter
from dayzero.engine.device_peaks import peak_flops
from dayzero.engine.ema import Ema
from dayzero.engine.flops import StepFlops, count_flops
from dayzero.engine.lr_scheduler import lr_factor
from dayzero.engine.megatron_fsdp import adapt_optimizer, has_unequal_shards
from dayzero.engine.metrics import MetricsLog, peak_memory_gib, speed
from dayzero.engine.optimizer import build_optimizer, clip_grad_norm, set_lr
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.passes import backward, summed_loss
from dayzero.engine.signals import StopRequest


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
    """Training was asked to stop; the checkpoint of its last step, if it did one, is complete."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped as asked after step {step}: start again to continue")


class NonFiniteLoss(ValueError):
    """The loss or the gradient norm is NaN or infinite; the optimizer has not stepped."""


@dataclass(kw_only=True)
class Trainer:
    """One rank's model, optimizer and step; built identically on every rank.

    `identity` is what a checkpoint must agree with to be continued; `directory` holds `checkpoints/`. It is made before
    the model's first forward call, after which FSDP2 leaves gathered parameters in the place of the root's shards.
    """

    model: ParallelModel
    directory: Path
    identity: dict[str, Any]
    max_steps: int = 0
    """Optimizer steps in all; set before `fit`."""
    step: int = 0
    """Optimizer steps done."""
    saved: int = 0
    """The newest step with a checkpoint, which may still be being written. 0: none."""
    validation_losses: dict[int, float] = field(default_factory=dict)
    checkpoint_seconds: float = 0.0
    """How long this process's training has stood still for checkpoints."""

    def __post_init__(self) -> None:
        model = self.model
        self.module, self.train, self.dims = model.module, model.train, model.dims
        self.peak_flops = peak_flops(model.device, self.train.precision)
        self.flops: StepFlops | None = (
            count_flops(model.weights.empty_model(quantized=False)) if self.peak_flops else None
        )
        trained = [p for p in self.module.parameters() if p.requires_grad]
        assert self.dims.strategy != "fsdp2" or all(isinstance(p, DTensor) for p in trained), "gathered parameters"
        self.optimizer = build_optimizer(self.module, self.train.optimizer, copies=model.copies)
        if has_unequal_shards(self.module):
            adapt_optimizer(self.optimizer)
        self.ema = Ema(self.module, self.train.ema.decay) if self.train.ema else None
        self.metrics = MetricsLog(self.checkpoints / "metrics.jsonl", enabled=self.is_main)
        self.writer = CheckpointWriter(self.checkpoints, self.train.checkpoint)

    @property
    def is_main(self) -> bool:
        return distributed.rank() == 0

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        if self.is_main:
            checkpoint.remove_unfinished(self.checkpoints)
        distributed.barrier()
        found = checkpoints(self.checkpoints)
        if found:
            saved = checkpoint.check_identity(found[-1], self.identity)
            copies = self.model.names_of_copies
            checkpoint.load_checkpoint(found[-1], self.module, self.optimizer, copies, self._averages())
            if self.ema:
                self.ema.loaded(copies)
            self.step = self.saved = saved["step"]
            self.validation_losses = {int(k): v for k, v in saved["validation_losses"].items()}
            if self.is_main:
                log.info("continuing from %s", found[-1])

    def fit(self, batches: Callable[[int], Iterable[Batch]], validation: Callable[[], Iterable[Batch]] | None) -> None:
        """Train from `step` to `max_steps`. `batches(step)` yields this rank's batches from that step on.

        Raises `NonFiniteLoss`, `CheckpointFailed`, and `Interrupted` after SIGTERM or SIGUSR1: at the end of the step
        under way, once its checkpoint is written.
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
                record = self.train_step(batch, stop.asked or self.writer.failed)
                if record is None:
                    if self.step > self.saved:
                        self.save(wait=False)
                    self.writer.wait()
                    raise Interrupted(self.step)
                self.step = batch.step + 1
                last = self.step == self.max_steps
                seconds = time.perf_counter() - started
                peak = (record.pop("flops"), self.peak_flops)
                record |= speed(record["num_tokens"], seconds, started - waiting_since, self.dims.world_size, *peak)
                record |= {"peak_memory_gib": peak_memory_gib(self.model.device), "checkpoint_seconds": waited}
                if validation and (last or (self.train.validate_every and self.step % self.train.validate_every == 0)):
                    record["validation_loss"] = self.validation_losses[self.step] = self.validate(validation())
                self.metrics.write(record)
                progress.advance(loss=record["loss"], tokens_per_second=round(record["tokens_per_second"]))
                every, waited = self.train.checkpoint.every, 0.0
                if last or (every and self.step % every == 0):
                    waited = self.save(wait=last)
                waiting_since = time.perf_counter()

    def train_step(self, batch: Batch, stop: bool = False) -> dict[str, Any] | None:
        """One optimizer step; returns its record, or None and does nothing where any rank was asked to `stop`."""
        model, step = self.model, batch.step + 1
        # every step has its own seed, so a resumed run needs no saved RNG state
        torch.manual_seed((model.seed * 1_000_003 + step) * 1_009 + self.dims.seed_rank(distributed.rank()))
        lr = self.train.optimizer.lr * lr_factor(step, self.max_steps, self.train.lr_scheduler)
        set_lr(self.optimizer, lr)
        rows = sum(int((m["lengths"] > 0).sum()) for m in batch.micro_batches)
        flops = self.flops.of_batch(batch.micro_batches, batch.num_label_tokens) if self.flops else 0.0
        counts: list[float] = [batch.num_label_tokens, batch.num_tokens, rows, stop, flops]
        num_labels, num_tokens, num_rows, stops, flops = self._sum_over_rows(counts)
        if stops:
            return None
        # FSDP2 and DDP average gradients over ranks; the loss is a sum over ranks
        scale = self.dims.dp * self.dims.cp / max(num_labels, 1)
        # a mean over rows, written as a part of the sum that is divided by the label tokens
        router_weight = model.router_coefficient * max(num_labels, 1) / num_rows
        loss_sum = backward(model, batch.micro_batches, scale, router_weight)
        loss = self._sum_over_tokens(loss_sum) / max(num_labels, 1)
        stages = model.pipeline.group if model.pipeline else None
        grad_norm = clip_grad_norm(
            self.module.parameters(), self.train.max_grad_norm, copies=model.copies, across=stages
        )
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise NonFiniteLoss(
                f"loss {loss} and gradient norm {grad_norm} at step {step}, source rows {batch.row_ids}: inspect "
                "those rows, lower the learning rate, or train in fp32; earlier checkpoints are kept"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update()
        record = {"step": step, "epoch": batch.epoch, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        if model.router_loss:
            record["router_aux_loss"] = self._sum_over_tokens(model.router_loss.take_sum()) / num_rows
        if model.distillation:
            record["kl"] = self._sum_over_tokens(model.distillation.take_sum()) / max(num_labels, 1)
        record |= {"num_label_tokens": int(num_labels), "num_tokens": int(num_tokens), "flops": flops}
        return record

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> float:
        """Mean loss of a label token over all validation rows, without auxiliary losses. Raises `NonFiniteLoss`."""
        self.module.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)  # read once, as in training
        num_labels = 0.0
        for batch in batches:
            for micro_batch in batch.micro_batches:
                total += summed_loss(self.model, micro_batch)
            num_labels += batch.num_label_tokens
        self.module.train()
        loss = self._sum_over_tokens(total.item()) / max(self._sum_over_rows([num_labels])[0], 1)
        if not math.isfinite(loss):  # it would be neither better nor worse than any other
            raise NonFiniteLoss(
                f"validation loss {loss} after step {self.step}: inspect the validation rows, lower the learning rate, "
                "or train in fp32; earlier checkpoints are kept"
            )
        return loss

    def save(self, *, wait: bool) -> float:
        """Checkpoint the present step; with `wait` it is complete on return. Returns the seconds that took here."""
        started = time.perf_counter()
        trainer = {"identity": self.identity, "validation_losses": dict(self.validation_losses)}
        copies = self.model.names_of_copies
        state = checkpoint.state_of(self.module, self.optimizer, copies, more=self._averages(), for_saving=True)
        self.writer.save(self.step, state, trainer)
        self.saved = self.step
        if wait:
            self.writer.wait()
        seconds = time.perf_counter() - started
        self.checkpoint_seconds += seconds
        return seconds

    def _averages(self) -> dict[str, Tensor]:
        return self.ema.state(self.model.names_of_copies) if self.ema else {}

    def _sum_over_rows(self, values: list[float]) -> list[float]:
        """Sum over the ranks that see different rows."""
        copies = self.dims.world_size // self.dims.dp
        return [value / copies for value in distributed.all_reduce_sum(values, self.model.device)]

    def _sum_over_tokens(self, value: float) -> float:
        """Sum over the ranks that see different tokens."""
        return distributed.all_reduce_sum([value], self.model.device)[0] / self.dims.tp
