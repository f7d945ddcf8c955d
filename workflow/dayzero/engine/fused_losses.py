"""Losses for heads that are one plain linear layer: logits never exist, or only in parts.

They read the head's weight itself, which inside the root's forward call is gathered (see `CausalLMWithLoss`). What is
more than a linear layer (a scale, a cap, an adapter) they would leave out in silence, so `plain_head` finds that out.

Shapes: B rows, T tokens, D model width, V vocabulary, N label tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from dayzero.engine.chunks import IGNORE, sum_of_chunks
from dayzero.engine.loss import Head, LossOptions, at_labels, chunked, decoder_returns, has_labels
from dayzero.engine.structure import find_decoder
from dayzero.engine.vocab_parallel import SumGradients, TakeRows, VocabParallelCrossEntropy, own_rows


class _Output(BaseModelOutputWithPast):
    """What a decoder returns besides hidden states (caches, router logits) is not there, whatever it is called."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The head of the meta-device `model` if its logits are head(hidden states) and nothing else, else None.

    Seen in one call: the head gets the hidden states as they are (or all of a slice of them), once, and what it returns
    is returned.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return None
    hidden = torch.empty(1, 2, head.in_features, device="meta")
    seen: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    try:
        with decoder_returns(find_decoder(model), _Output(last_hidden_state=hidden)):  # type: ignore[arg-type]
            tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
            logits = model(input_ids=tokens, use_cache=False).logits
    except Exception:  # whatever its own code has against such a call, it goes its own way then
        return None
    finally:
        hook.remove()
    if len(seen) != 1:
        return None
    given, made = seen[0]
    same = given is hidden or (given._base is hidden and given.shape == hidden.shape)
    return head if same and logits is made and hidden._version == 0 and made._version == 0 else None


def cut_cross_entropy(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor, options: LossOptions
) -> Tensor:
    """Cut Your Losses (https://arxiv.org/abs/2411.09009), by the package cut-cross-entropy.

    Its kernels need a GPU and bfloat16; elsewhere its compiled variant runs, which has the label positions' logits.
    """
    from cut_cross_entropy import linear_cross_entropy

    if not has_labels(labels, options):
        return chunked(model, input_ids, labels, position_ids, options)
    hidden, weight, _, labels = _label_states(model, input_ids, labels, position_ids, options)
    implementation: dict[str, Any] = {"impl": "torch_compile"}
    if hidden.is_cuda:
        # "auto" leaves out only gradients below what bfloat16 adds to anything
        implementation = {"impl": "cce", "filter_eps": "auto"}
        hidden, weight = hidden.to(torch.bfloat16), weight.to(torch.bfloat16)
    return linear_cross_entropy(
        hidden.contiguous(), weight, labels, ignore_index=IGNORE, reduction="sum", **implementation
    ).float()


def liger_fused(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor, options: LossOptions
) -> Tensor:
    """Liger's fused linear cross-entropy (https://arxiv.org/abs/2410.10989): gradients are made chunk by chunk already
    in the forward pass. Gradients of the weight are added up in float32."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if not has_labels(labels, options):
        return chunked(model, input_ids, labels, position_ids, options)
    hidden, weight, bias, labels = _label_states(model, input_ids, labels, position_ids, options)
    function = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE, lse_square_scale=options.z_loss, reduction="sum", accum_dtype=torch.float32
    )
    return function(weight, hidden, labels, bias).float()


def loss_parallel(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor, options: LossOptions
) -> Tensor:
    """Each tp rank has the logits of its share of the vocabulary, of one chunk of label positions at a time."""
    group = options.group
    assert group is not None
    hidden, weight, bias, labels = _label_states(model, input_ids, labels, position_ids, options)
    start, stop = own_rows(len(weight), group)
    hidden = SumGradients.apply(hidden, group)
    weight = TakeRows.apply(weight, start, stop, group)  # [V / R, D]
    bias = None if bias is None else TakeRows.apply(bias, start, stop, group)

    def chunk_loss(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(hidden, weight, bias).float()
        return VocabParallelCrossEntropy.apply(logits, labels, start, options.z_loss, IGNORE, group)

    weights = [weight] if bias is None else [weight, bias]
    return sum_of_chunks(chunk_loss, hidden, labels, options.chunk_size, weights=weights)


def _label_states(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states [N, D] of the label positions, the head's weight [V, D] and bias [V], and labels [N]."""
    labels, hidden = at_labels(labels, options, Head(model).hidden(input_ids, position_ids))
    head: Any = model.get_output_embeddings()
    return hidden, head.weight, head.bias, labels
