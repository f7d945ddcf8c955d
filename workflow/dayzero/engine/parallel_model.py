"""The model that is trained, with its loss, as this rank holds it: built empty, split over the mesh, then filled.

What it computes stands in `passes.py`, what is put together from all ranks in `gathering.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from dayzero.config import Method, Train
from dayzero.console import log
from dayzero.engine import distributed
from dayzero.engine.context_parallel import ContextParallel
from dayzero.engine.distillation import Distillation, build_teacher, check_vocabularies, teacher_weights
from dayzero.engine.float8 import convert_to_float8
from dayzero.engine.frozen import frozen_in_bf16, keep_frozen_in_bf16
from dayzero.engine.kernels import use_attention, use_fused_kernels
from dayzero.engine.lora import is_adapter, warn_of_frozen_experts
from dayzero.engine.lora_targets import not_adapted
from dayzero.engine.loss import CausalLMWithLoss, Loss, LossOptions
from dayzero.engine.loss_choice import LossChoice, choose_loss
from dayzero.engine.model import ModelSource, count_parameters
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallelize import parallelize
from dayzero.engine.pipeline_cut import Anatomy, anatomy
from dayzero.engine.precision import computes_in_bf16, weights_dtype
from dayzero.engine.router_loss import RouterLoss, router_loss_coefficient
from dayzero.engine.sharded import own_parameters
from dayzero.engine.tiny_copy import mixes_dtypes
from dayzero.engine.token_split import require_context_parallel
from dayzero.engine.weights import Weights


@dataclass(kw_only=True)
class ParallelModel:
    """The model of `source` with what `method` adds to it, on the mesh of `dims`; built identically on every rank.

    Raises `ConfigError` or `DataError` where they do not go together.
    """

    source: ModelSource
    tokenizer_directory: Path | None = None
    """The tokenizer of a new architecture, which has its vocabulary."""
    method: Method
    train: Train
    dims: ParallelDims
    seed: int
    """Of the initial values of what the directory does not hold: all weights, or adapters."""
    device: torch.device
    teacher: ModelSource | None = None
    """Whom the model learns from; for method kd."""

    def __post_init__(self) -> None:
        # from headers alone, on every rank alike: a model that cannot be loaded is said before any waits for another
        config = self.source.config(self.tokenizer_directory)
        self.weights = Weights(self.source, config, self.method, self.seed, dtype=weights_dtype(self.train.precision))
        self.context: ContextParallel | None = None
        if self.dims.cp > 1:
            self.context = ContextParallel(self.dims.build_cp_mesh(self.device.type).get_group(), self.dims.cp_method)
            require_context_parallel(self.weights.template, self.dims.cp, self.dims.cp_method)
        self.mesh = None if self.dims.strategy == "none" else self.dims.build_mesh(self.device.type)
        self.distillation: Distillation | None = None
        if self.teacher is not None:
            self.teacher_weights = teacher_weights(self.teacher)
            check_vocabularies(self.weights.template, self.teacher_weights.template, str(self.method.kd.teacher))
            teacher = build_teacher(self.teacher_weights, self.train, self.dims, self.mesh, self.device)
            self.distillation = Distillation(teacher, self.method.kd)
        self.anatomy: Anatomy | None = None
        """Where a pipeline cuts the model; for pp."""
        self.loss_choice: LossChoice | None = None
        self.attention: str
        """Which attention train.attention came to."""
        self.fused_kernels = False
        """Whether the model runs with Liger's kernels."""
        bare = self.empty_module()
        model = bare.model
        # the template's: an adapter around it has no size
        self.vocab_size: int = cast(nn.Embedding, self.weights.template.get_input_embeddings()).num_embeddings
        self.trainable_parameters, self.total_parameters = count_parameters(model)
        if self.method.adapters and distributed.rank() == 0:
            warn_of_frozen_experts(model, self.method.adapters)
            if left := not_adapted(self.weights.template, self.weights.method):
                said = "an adapter would do nothing there, or PEFT takes the name for that of experts"
                log.warning("method.lora.targets all-linear leaves out %s: %s", ", ".join(left), said)
        self.mixes_dtypes = computes_in_bf16(self.train.precision) and mixes_dtypes(self.weights.template)
        """Whether bf16 needs autocast under FSDP2 too, which casts parameters but not buffers."""
        self.router_loss = bare.router_loss
        self.router_coefficient = router_loss_coefficient(model, self.train.router_aux_loss_coef, self.dims)
        load = partial(self.weights.load, bare, model, self.device, offload=self.train.cpu_offload)
        self.keeps_gathered = self._only_adapters_are_sharded(bare)
        """Whether FSDP2 gathers once a step instead of in each pass, and so copies what it gathers."""
        self.module, self.partial, self.pipeline = parallelize(
            bare, self.dims, self.mesh, self.train, load, self.anatomy, keep_gathered=self.keeps_gathered
        )
        self.sharded_adapters = _sharded_adapters(self.module)
        """The parts of the model of which FSDP2 trains nothing but adapters."""
        self.copies = self.pipeline.copies_here() if self.pipeline else frozenset[int]()
        """Ids of parameters here that another stage of the pipeline holds too, and accounts for."""

    def _only_adapters_are_sharded(self, bare: CausalLMWithLoss) -> bool:
        """Whether all that FSDP2 has of the model are adapters, which are small: the rest is left out of it."""
        if not self.dims.unsharded or self.train.cpu_offload:
            return False
        left_out = frozen_in_bf16(bare)
        return all(is_adapter(name) for name, p in bare.named_parameters() if p not in left_out)

    @property
    def names_of_copies(self) -> dict[str, str]:
        """Name of a tied parameter's copy in a pipeline -> the name of what it is a copy of."""
        return {copy: name for name, copy in self.pipeline.copies} if self.pipeline else {}

    def empty_module(self, *, plain: bool = False) -> CausalLMWithLoss:
        """The model with its loss, on the meta device; a `plain` one without fused kernels and 8-bit products."""
        model = self.weights.empty_model()
        if self.train.precision == "bf16" and self.dims.strategy == "fsdp2":
            keep_frozen_in_bf16(model, self.weights.stored_dtype)
        if self.dims.pp > 1 and self.anatomy is None:
            self.anatomy = anatomy(model, self.dims.pp)
        self.attention = use_attention(model, self.train, self.dims)
        if not plain:
            self.fused_kernels = use_fused_kernels(model, self.train, self.dims)
            if self.train.fp8:
                convert_to_float8(model, self.train.fp8)
        router_loss = None
        if router_loss_coefficient(model, self.train.router_aux_loss_coef, self.dims):
            router_loss = RouterLoss(model, self.context.group if self.context else None)
        options = LossOptions(
            chunk_size=self.train.loss_chunk_size,
            z_loss=self.train.z_loss or 0.0,
            group=self.mesh.get_group("tp") if self.mesh is not None and self.dims.tp > 1 else None,
        )
        return CausalLMWithLoss(model, loss=self._loss(model), options=options, router_loss=router_loss)

    def _loss(self, model: PreTrainedModel) -> Loss:
        """The loss of the run, chosen when it is asked for the first time."""
        if self.loss_choice is None:
            # a teacher's loss goes through both models' own heads
            train = self.train.model_copy(update={"loss": "chunked"}) if self.distillation else self.train
            self.loss_choice = choose_loss(model, train, self.dims, cuda=self.device.type == "cuda")
            if distributed.rank() == 0:
                reason = "with a teacher's" if self.distillation else self.loss_choice.reason
                log.info("loss: %s (%s)", self.loss_choice.name, reason)
        return self.distillation.loss if self.distillation else self.loss_choice.function


def _sharded_adapters(module: nn.Module) -> list[FSDPModule]:
    found: list[FSDPModule] = []
    for part in module.modules():
        if isinstance(part, FSDPModule):
            trained = [name for name, p in own_parameters(part) if p.requires_grad]
            if trained and all(is_adapter(name) for name in trained):
                found.append(part)
    return found
