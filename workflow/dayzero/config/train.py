"""`train`: the training loop."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dayzero.config.optimizer import LrScheduler, Optimizer
from dayzero.config.section import Section


class Checkpoint(Section):
    """Checkpoints to resume from (torch.distributed.checkpoint)."""

    every: NonNegativeInt = 100
    """Steps between checkpoints. 0: only at the end and when asked to stop."""
    keep_last: PositiveInt = 2
    """Complete checkpoints kept, the newest ones."""
    keep_best: NonNegativeInt = 0
    """Checkpoints kept besides for their lowest validation loss. Only those of steps with a validation count, so
    `validate_every` must divide `every`; one made when asked to stop may have none. 0: off."""
    asynchronous: bool = True
    """Write in the background: training waits only while weights and optimizer state are copied to the CPU's memory,
    which needs room for a second copy of this rank's share. Off: training waits for the disk."""


class Ema(Section):
    """An exponential moving average of the weights, kept beside them at the same size in memory."""

    decay: float = Field(gt=0, lt=1)
    """Share of the average that stays in each step, e.g. 0.999."""


class Fp8(Section):
    """Matrix products of the layers' linears in 8-bit floats, over bf16 (docs/methods.md)."""

    backend: Literal["torchao", "transformer_engine"] = "torchao"
    """Whose products: torchao's (frozen weights: our own), or NVIDIA's transformer-engine, under its autocast."""
    recipe: Literal["tensorwise", "rowwise", "delayed", "block", "mxfp8"] = "tensorwise"
    """One scale for a whole tensor (fastest), or with torchao for each row (closer). transformer_engine has besides
    tensorwise: delayed (scales of earlier steps), block, and on Blackwell mxfp8."""
    all_gather: bool = False
    """Gather weights in 8 bits too: half the traffic of FSDP2. Only tensorwise, and for weights that are trained."""
    skip: list[str] = []
    """Names of linears, whole or their last parts, that stay as they are."""
    emulate: bool = False
    """Round to 8 bits but multiply in float32: slow, to see the rounding's effect on any machine."""


class Train(Section):
    """The training loop."""

    max_steps: PositiveInt | None = None
    """Optimizer steps. null: as `num_epochs` says."""
    num_epochs: PositiveFloat | None = None
    """Passes over the training rows. null: as `max_steps` says."""
    global_batch_size: PositiveInt = 32
    """Rows in an optimizer step, over all ranks and micro-batches."""
    local_batch_size: PositiveInt = 4
    """Rows in one forward pass of one rank; the rest is gradient accumulation."""
    precision: Literal["fp32", "bf16", "bf16_pure"] = "bf16"
    """bf16: compute in bfloat16, weights in float32, gradients reduced in float32. bf16_pure: weights in bfloat16 too,
    which saves half their memory and loses small updates. Moments: optimizer.state_dtype. Rotary tables: float32."""
    fp8: Fp8 | None = None
    """Compute in 8-bit floats (NVIDIA GPUs from Ada on). null: off."""
    loss: Literal["auto", "cross_entropy", "chunked", "cut_cross_entropy", "liger_fused", "loss_parallel"] = "auto"
    """chunked: only label positions pass the LM head, in chunks, so that full logits never exist. cut_cross_entropy,
    liger_fused: kernels without logits (GPU). loss_parallel: each tp rank has its share of the vocabulary. auto: the
    best that can be had; the log says which and why. See docs/methods.md."""
    loss_chunk_size: PositiveInt = 1024
    """Label positions in a chunk, for chunked and loss_parallel."""
    z_loss: PositiveFloat | None = None
    """Adds so many times the mean over label tokens of the squared log of the sum of exponentials, e.g. 1e-4 (PaLM,
    https://arxiv.org/abs/2204.02311). null: off."""
    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    """Weight of the load balancing loss of a mixture of experts (the mean over rows of each row's). null: the model's
    own where its config has output_router_logits, else off. 0: off."""
    ema: Ema | None = None
    """Keep an average of the weights, which `export.weights: ema` exports. null: off."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the global gradient norm to this. 0: off."""
    activation_checkpointing: str = Field(
        default="none",
        pattern=r"^(none|full|selective|every_[1-9][0-9]*)$",
        examples=["none", "full", "selective", "every_2"],
    )
    """full: keep only each layer's input and compute the rest again in the backward pass; every_N: so for every N-th
    layer; selective: keep the results of attention and of every second matrix product."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the CPU's memory, and step there (strategy fsdp2)."""
    compile: bool = False
    """torch.compile each layer, into one graph where it can be one. What is compiled is kept in the user's cache."""
    attention: Literal["auto", "documents", "sdpa", "eager", "flex", "varlen"] = "auto"
    """documents: SDPA for one packed document after the other; flex (FlexAttention) and varlen (all documents in one
    call): CUDA only. auto: varlen in bf16 on a GPU, else documents, where the model attends by SDPA; else the model's
    own (docs/methods.md)."""
    kernels: Literal["auto", "none", "liger"] = "auto"
    """liger: Liger's norms and MLPs (NVIDIA GPUs, models it knows). auto: where they run and nothing is compiled."""
    optimizer: Optimizer = Optimizer()
    lr_scheduler: LrScheduler = LrScheduler()
    validate_every: NonNegativeInt = 50
    """Steps between validation losses. 0: only at the end."""
    checkpoint: Checkpoint = Checkpoint()
    num_data_workers: NonNegativeInt = 0
    """Loader processes for each rank. 0: in the training process."""
