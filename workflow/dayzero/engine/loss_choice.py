"""Which loss a run has: the named one if it can be had, or the best that the machine and the mesh can run."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from transformers import PreTrainedModel

from dayzero.config import Train
from dayzero.engine.fused_losses import cut_cross_entropy, liger_fused, loss_parallel, plain_head
from dayzero.engine.loss import Loss, chunked, cross_entropy
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.precision import computes_in_bf16
from dayzero.engine.structure import find_decoder
from dayzero.errors import ConfigError

LOSSES: dict[str, Loss] = {
    "chunked": chunked,
    "cross_entropy": cross_entropy,
    "cut_cross_entropy": cut_cross_entropy,
    "liger_fused": liger_fused,
    "loss_parallel": loss_parallel,
}

PREFERENCE = ("loss_parallel", "liger_fused", "cut_cross_entropy", "chunked", "cross_entropy")
"""What `auto` tries in turn: logits split over the tp ranks, a chunk's in fused kernels, none at all, a chunk's, all.
Liger's is before cut cross-entropy: closer to the reference, and under a frozen head faster (docs/methods.md)."""


@dataclass(frozen=True)
class LossChoice:
    """The loss of a run, and why that one."""

    name: str
    reason: str

    @property
    def function(self) -> Loss:
        return LOSSES[self.name]


def choose_loss(model: PreTrainedModel, train: Train, dims: ParallelDims, *, cuda: bool) -> LossChoice:
    """The loss for the meta-device `model`. Raises `ConfigError` where the one that is named cannot be had."""
    if train.loss != "auto":
        if problem := obstacle(train.loss, model, train, dims, cuda=cuda):
            raise ConfigError(f"train.loss {train.loss}: {problem}: use auto, which takes the best that can be had")
        return LossChoice(train.loss, "as configured")
    problems: list[str] = []
    for name in PREFERENCE:
        worthless = "needs a GPU to be of use" if name == "cut_cross_entropy" and not cuda else None
        problem = worthless or obstacle(name, model, train, dims, cuda=cuda)
        if problem is None:
            return LossChoice(name, "; ".join(problems) or "the first choice")
        problems.append(f"{name} {problem}")
    raise AssertionError("cross_entropy can always be had")


def obstacle(name: str, model: PreTrainedModel, train: Train, dims: ParallelDims, *, cuda: bool) -> str | None:
    """Why the loss `name` cannot be had; None if it can."""
    if name == "cross_entropy":
        return None
    if name == "chunked":
        return _no_decoder(model)
    if name == "loss_parallel" and dims.tp == 1:
        return "splits the vocabulary over tp ranks, but parallelism.tp is 1"
    if dims.pp > 1:
        return f"reads the head's weight, which with pp {dims.pp} only the last stage has"
    if dims.strategy == "megatron_fsdp":
        return "reads the head's weight, which megatron_fsdp gathers for the model's own modules only"
    if name == "cut_cross_entropy":
        if find_spec("cut_cross_entropy") is None or find_spec("triton") is None:
            return "needs the packages cut-cross-entropy and triton, which are not installed"
        if cuda and not computes_in_bf16(train.precision):
            return f"computes in bfloat16 on a GPU, but train.precision is {train.precision}"
        if train.z_loss:
            return f"does not tell the sum of exponentials that train.z_loss {train.z_loss:g} needs"
    if name == "liger_fused":
        if not cuda:
            return "needs a GPU, and none is here"
        if find_spec("liger_kernel") is None:
            return "needs the package liger-kernel, which is not installed"
    head = plain_head(model)
    if head is None:
        return f"takes logits to be head(hidden states), but {type(model).__name__} does more"
    if name == "cut_cross_entropy" and head.bias is not None:
        return f"has no bias, but the head of {type(model).__name__} has one"
    return None


def _no_decoder(model: PreTrainedModel) -> str | None:
    try:
        find_decoder(model)
    except ValueError as error:
        return str(error).partition(":")[0]
    return None
