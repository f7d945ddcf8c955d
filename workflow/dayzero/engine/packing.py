"""Does a model read from left to right, and keep packed documents apart? Asked of it, since both fail in silence.

A model that sees the token it has to predict learns to copy it. Attention over position ids that restart is masked by
transformers; state-space, convolution and compression layers carry what they saw into the next document. No table of
architectures: the loaded model is tried as it is trained, but for products of 8 bits (see `passes.probe_logits`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dayzero.console import log
from dayzero.engine.document_attention import DOCUMENTS, forget_documents
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.passes import probe_logits, teacher_logits
from dayzero.engine.precision import computes_in_bf16
from dayzero.engine.tiny_copy import VOCAB_SIZE, tiny_copy
from dayzero.errors import ConfigError, one_line

EDITED = {"fp32": 1e-5, "bf16": 1e-3}
"""Rounding, as a share of the largest logit, when only another document's tokens change: shapes and kernels stay the
same, so what is kept apart stays the same to the bit but for experts that are grouped differently. In float32 leaks
were seen from 6e-4 upwards and noise up to 1.2e-7."""

ALONE = {"fp32": 1e-4, "bf16": 0.1}
"""Rounding when the other document goes away: other shapes take other kernels. Finds models that keep documents apart
from one another's tokens but not from one another's presence."""

OWN_ROUNDING = 10
"""Times that a token's own rounding is allowed besides. A trained model has tokens whose logits amplify it: one in 59
of SmolLM2-135M's over tp 3 moved by 4e-4, all others by 1e-6 to 1e-5."""

COPIES = 4
"""Rows of the same document whose logits show that rounding."""


def require_causal(model: ParallelModel) -> None:
    """Raise `ConfigError` where the model, or its teacher, sees the tokens that are to be predicted."""
    asked = [("model", "learn", partial(probe_logits, model), model.weights)]
    if model.distillation:
        asked.append(("method.kd.teacher", "teach", partial(teacher_logits, model), model.teacher_weights))
    for field, would, logits, weights in asked:
        moved = reads_ahead(logits, model.vocab_size, _rounding(model))
        if moved is not None:
            raise ConfigError(
                f"{field}: {type(weights.template).__name__} reads later tokens (changing them moves earlier logits by "
                f"{moved:.2g}), so it would {would} to copy what it should predict: choose a model that reads from "
                "left to right, or, where its config has is_decoder, set that"
            )


def any_leak(model: ParallelModel) -> float | None:
    """How far packed documents reach into one another in this model, or in its teacher, see `packing_leak`; None if
    they do not."""
    precision = _rounding(model)
    leak = packing_leak(partial(probe_logits, model), model.vocab_size, precision)
    if leak is None:
        leak = architecture_leak(model.weights.template, model.attention)
    if leak is None and model.distillation:
        leak = packing_leak(partial(teacher_logits, model), model.vocab_size, precision)
        if leak is None:
            leak = architecture_leak(model.teacher_weights.template, model.distillation.teacher.attention)
    return leak


def _rounding(model: ParallelModel) -> str:
    return "bf16" if computes_in_bf16(model.train.precision) else "fp32"


def reads_ahead(logits: Callable[[Tensor, Tensor], Tensor], vocab_size: int, precision: str) -> float | None:
    """How far logits move when only later tokens change; None if they stay, as they do in a causal language model.

    `logits`: as in `packing_leak`. The result is a share of the largest logit.
    """
    generator = torch.Generator().manual_seed(0)
    first, second, other = torch.randint(0, vocab_size, (3, 1, 12), generator=generator)
    positions = torch.arange(24).unsqueeze(0)
    before = logits(torch.cat([first, second], dim=1), positions)[:, :12]
    after = logits(torch.cat([first, other], dim=1), positions)[:, :12]
    moved = ((before - after).abs().max() / before.abs().max().clamp(min=1e-6)).item()
    return moved if moved > EDITED[precision] else None  # not a number is no answer: the first step says so


LENGTHS = (9, 21, 12, 17)
"""Tokens of the documents of the row that is tried."""


def packing_leak(logits: Callable[[Tensor, Tensor], Tensor], vocab_size: int, precision: str) -> float | None:
    """How far a document's logits move when other documents of its row change or go away; None if they stay.

    `logits(input_ids, position_ids)` ([B, T] both) gives [B, T, V]. The result is a share of the largest logit.
    """
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(0, vocab_size, (1, length), generator=generator) for length in LENGTHS]
    others = [torch.randint(0, vocab_size, document.shape, generator=generator) for document in documents[:2]]
    places = [torch.arange(length).unsqueeze(0) for length in LENGTHS]
    positions = torch.cat(places, dim=1)
    packed = logits(torch.cat(documents, dim=1), positions)
    edited = logits(torch.cat([*others, *documents[2:]], dim=1), positions)
    alone = torch.cat([logits(d, p) for d, p in zip(documents, places, strict=True)], dim=1)
    # rows of a batch do not see one another, but sums over ranks and kernels round them differently
    rows = [logits(d.expand(COPIES, -1), p.expand(COPIES, -1)) for d, p in zip(documents, places, strict=True)]
    scale = alone.abs().max().clamp(min=1e-6)
    after = sum(LENGTHS[:2])
    moved_by_edit = ((packed - edited)[:, after:].abs().max() / scale).item()
    own_rounding = (torch.cat(rows, dim=1) - alone).abs().amax(dim=(0, 2)) / scale  # [T]
    moved = (packed - alone).abs().amax(dim=(0, 2)) / scale
    moved_by_removal = (moved - OWN_ROUNDING * own_rounding).max().item()
    if math.isnan(moved_by_edit + moved_by_removal):
        return None  # broken weights: the first step says so
    if moved_by_edit <= EDITED[precision] and moved_by_removal <= ALONE[precision]:
        return None
    return max(moved_by_edit, moved_by_removal)


def architecture_leak(model: PreTrainedModel, attention: str) -> float | None:
    """`packing_leak` of a tiny copy of `model`, whose windows, chunks and choices among tokens are so short that a
    few dozen tokens reach past them; None where it has none or no copy can be made.

    `attention`: what train.attention came to.
    """
    small = tiny_copy(model)
    if small is None:
        return None
    if attention == "documents":
        small.set_attn_implementation(DOCUMENTS)

    @torch.no_grad()
    def logits(input_ids: Tensor, position_ids: Tensor) -> Tensor:
        forget_documents()
        return small(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float()

    try:
        return packing_leak(logits, VOCAB_SIZE, "fp32")
    except Exception as error:  # what cannot compute a packed row is not given one
        log.warning("a tiny copy of the model cannot compute a packed row: %s", one_line(error))
        return math.inf
