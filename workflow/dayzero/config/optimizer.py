"""`train.optimizer` and `train.lr_scheduler`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from dayzero.config.section import Section


class Muon(Section):
    """What only train.optimizer.name muon uses (https://kellerjordan.github.io/posts/muon/)."""

    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the momentum."""
    nesterov: bool = True
    """Look one step ahead of the momentum."""
    num_iterations: PositiveInt = Field(default=5, lt=100)
    """Newton-Schulz iterations, in bfloat16, that make a matrix orthogonal."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How a matrix's shape scales its step. match_rms_adamw: as large as AdamW's, so that AdamW's learning rate and
    weight decay fit (https://arxiv.org/abs/2502.16982); original: sqrt(max(1, outputs / inputs))."""
    lr: PositiveFloat | None = None
    """Peak learning rate of the matrices. null: train.optimizer.lr."""


class Adafactor(Section):
    """What only train.optimizer.name adafactor uses (https://arxiv.org/abs/1804.04235)."""

    beta2_decay: float = Field(default=-0.8, le=0)
    """The second moment's new share at step t is t to the power of this."""
    clip_threshold: float = Field(default=1.0, ge=1)
    """Largest root mean square of an update, before the learning rate."""


class Optimizer(Section):
    """The optimizer, with decoupled weight decay; none on biases, norms and embeddings (docs/methods.md)."""

    name: Literal["adamw", "muon", "adafactor", "adamw8bit"] = "adamw"
    """adamw: https://arxiv.org/abs/1711.05101; muon: Muon for the matrices of the layers, AdamW for the rest;
    adafactor: second moments of rows and columns only; adamw8bit: AdamW with moments of 8 bits (torchao)."""
    lr: PositiveFloat = 2e-4
    """Peak learning rate."""
    betas: tuple[float, float] = Field(default=(0.9, 0.95), strict=False)
    """AdamW's decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on matrices. 0: off."""
    implementation: Literal["auto", "fused", "foreach", "for-loop"] = "auto"
    """Which of torch's AdamW. auto: fused, the fastest measured (docs/methods.md), where the device has it."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the moments, whatever that of the weights. Steps are computed in float32."""
    muon: Muon = Muon()
    adafactor: Adafactor = Adafactor()


class LrScheduler(Section):
    """The learning rate over the steps: linear warm-up, then the named curve."""

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """wsd: warm-up, stable, then linear decay over the last `decay_steps` (https://arxiv.org/abs/2404.06395)."""
    warmup_steps: NonNegativeInt = 0
    """Steps from 0 to the peak. 0: no warm-up."""
    decay_steps: NonNegativeInt | None = None
    """For wsd: steps of the final decay. null: a tenth of all steps."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """What the curve comes down to, in the step that would follow the last one, as a share of the peak."""
