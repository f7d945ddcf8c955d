"""Which attention and which fused kernels a model runs with, by what the machine and the model can do."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from dayzero.config import Train
from dayzero.engine.context_parallel import use_context_parallel
from dayzero.engine.difference import relative_difference
from dayzero.engine.document_attention import (
    DOCUMENTS,
    VARLEN,
    forget_documents,
    has_varlen,
    makes_its_own_mask,
)
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.precision import computes_in_bf16
from dayzero.engine.requirements import gpu_and_package_lacking, has_nvidia_gpu, require_gpu_and_package
from dayzero.engine.tiny_copy import TOKENS, tiny_copy
from dayzero.errors import ConfigError, one_line

NAMES = {"documents": DOCUMENTS, "varlen": VARLEN, "flex": "flex_attention", "sdpa": "sdpa", "eager": "eager"}
LIGER = "liger-kernel"


def require_kernels(train: Train) -> None:
    """Raise `ConfigError` where this machine cannot run the kernels that `train` names; starts nothing."""
    if train.attention in ("flex", "varlen") and not has_nvidia_gpu():
        raise ConfigError(
            f"train.attention {train.attention} trains on NVIDIA GPUs only, and torch sees none here: use auto"
        )
    if train.attention == "varlen" and not has_varlen():
        raise ConfigError(
            f"train.attention varlen needs torch.nn.attention.varlen, which torch {torch.__version__} has not: use auto"
        )
    if train.attention == "varlen" and train.precision == "fp32":
        raise ConfigError("train.attention varlen computes in bfloat16, but train.precision is fp32: use bf16, or sdpa")
    if train.kernels == "liger":
        require_gpu_and_package("train.kernels liger", LIGER, "use auto")


def use_attention(model: PreTrainedModel, train: Train, dims: ParallelDims) -> str:
    """Let `model` attend as `train.attention` says; returns what that came to. Over cp it has an attention of its own.

    auto is `varlen` in bf16 on a GPU, else `documents`, where the model's attention is SDPA and no pipeline stands in
    the way (of the latter, no compiler either); else the model's own. Raises `ConfigError` where the model cannot.
    """
    if dims.cp > 1:
        use_context_parallel(model)
        return "context parallel"
    own = str(model.config._attn_implementation)
    chosen = train.attention
    if chosen == "auto":
        chosen = "varlen" if has_varlen() and computes_in_bf16(train.precision) else "documents"
        by_documents = (
            own == "sdpa"
            and getattr(model, "_supports_attention_backend", False)
            and dims.pp == 1
            and not (train.compile and chosen == "documents")
            and not makes_its_own_mask(model)
            and _attends_alike(model)
        )
        if not by_documents:
            return own
    if chosen in ("documents", "varlen") and (own != "sdpa" or makes_its_own_mask(model)):
        has = f"has only {own}" if own != "sdpa" else "adds to its mask itself"
        raise ConfigError(
            f"train.attention {chosen} takes the place of sdpa, but {type(model).__name__} {has}: use auto"
        )
    try:
        model.set_attn_implementation(NAMES[chosen])
    except (ValueError, ImportError) as error:
        raise ConfigError(f"train.attention {chosen}: {one_line(error)}: use auto") from error
    if model.config._attn_implementation != NAMES[chosen]:
        raise ConfigError(f"train.attention {chosen}: {type(model).__name__} cannot have it: use auto")
    return chosen


@torch.no_grad()
def _attends_alike(model: PreTrainedModel) -> bool:
    """Whether a tiny copy of `model` computes the same without masks: some models read theirs, beside attention."""
    small = tiny_copy(model)
    if small is None:
        return True
    found = []
    try:
        for name in ("sdpa", DOCUMENTS):
            small.set_attn_implementation(name)
            forget_documents()
            found.append(small(input_ids=TOKENS, use_cache=False).logits.float())
    except Exception:  # each has its own way to miss its mask
        return False
    finally:
        forget_documents()
    own, by_documents = found
    return relative_difference(by_documents, own) <= 1e-4


def use_fused_kernels(model: PreTrainedModel, train: Train, dims: ParallelDims) -> bool:
    """Give `model` Liger's kernels (https://github.com/linkedin/Liger-Kernel) as `train.kernels` says; whether it has.

    Norms and MLPs, not the loss, which train.loss chooses. auto takes them where they run: on a GPU, for models that
    Liger knows, whose norms tensor parallelism has not split; and where no compiler does as much. Raises `ConfigError`.
    """
    unfit = train.compile or dims.tp > 1
    if train.kernels == "none" or (train.kernels == "auto" and (unfit or gpu_and_package_lacking(LIGER))):
        return False
    require_kernels(train)
    if dims.tp > 1:
        raise ConfigError(f"train.kernels liger: its norms cannot be split by parallelism.tp {dims.tp}: use auto")
    from liger_kernel.transformers import monkey_patch

    patch = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if patch is None:
        if train.kernels == "auto":
            return False
        known = ", ".join(sorted(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise ConfigError(f"train.kernels liger: Liger knows no {model.config.model_type} (it knows {known}): use auto")
    off = dict.fromkeys(("rope", "cross_entropy", "fused_linear_cross_entropy"), False)
    options: dict[str, Any] = {k: v for k, v in off.items() if k in inspect.signature(patch).parameters}
    with _unchanged(type(model).__module__):
        patch(model=model, **options)
    return True


@contextmanager
def _unchanged(module: str) -> Iterator[None]:
    """While active, what is assigned to names of the module is taken back in the end.

    Liger changes the modules of the model it is given, and the classes of all models besides: those of small copies
    and teachers, which also run on the CPU, where its kernels read wrong memory. (Rotary embeddings are a function that
    only the latter way can change, so they stay the model's own.)
    """
    names = vars(sys.modules[module])
    before = dict(names)
    try:
        yield
    finally:
        names.update(before)
