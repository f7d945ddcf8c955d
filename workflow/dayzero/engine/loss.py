"""The loss of a causal language model: sum over label tokens, from input ids to a scalar, in one forward call.

Shapes: B rows, T tokens, D model width, V vocabulary, N label tokens.

Every loss has one signature, (model, input_ids, labels, position_ids, options) -> scalar; `loss_choice.py` says which
one a run has. Where logits are just head(hidden states), losses that do without logits can be had (`fused_losses.py`);
the two here go through the model's own head, whatever it does.

Labels are already shifted: `labels[b, t]` is the token that position t has to predict, or -100. A loss is a sum, never
a mean: the trainer divides by the global number of label tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from dayzero.engine.chunks import IGNORE, sum_of_chunks, token_cross_entropy
from dayzero.engine.document_attention import forget_documents
from dayzero.engine.router_loss import RouterLoss
from dayzero.engine.structure import find_decoder


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What a loss may use."""

    chunk_size: int = 1024
    """Label positions whose logits exist at a time."""
    z_loss: float = 0.0
    """Weight of the squared logarithm of the sum of exponentials (PaLM, https://arxiv.org/abs/2204.02311, section 5),
    which keeps logits from drifting; its mean is over label tokens. In training only."""
    group: dist.ProcessGroup | None = None
    """The tp ranks over which a loss splits the vocabulary."""
    positions: Tensor | None = None
    """int64 [N]: where in the rows end to end the labels are, if that is known and there are any."""


Loss = Callable[[PreTrainedModel, Tensor, Tensor, Tensor, LossOptions], Tensor]


class CausalLMWithLoss(nn.Module):
    """A Hugging Face causal LM whose forward call returns the summed loss instead of logits.

    It is the module that FSDP2 or DDP wraps: head and loss run inside its forward call, where the root's weights
    (embedding, LM head) are gathered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        loss: Loss | None = None,
        options: LossOptions | None = None,
        router_loss: RouterLoss | None = None,
    ) -> None:
        super().__init__()
        self.model: PreTrainedModel = model
        self.router_loss = router_loss
        self._loss = loss or chunked
        self._options = options or LossOptions()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        position_ids: Tensor,
        real_tokens: Tensor | None = None,
        router_weight: float = 0.0,
        positions: Tensor | None = None,
    ) -> Tensor:
        """input_ids, labels, position_ids [B, T] -> sum of token losses, float32 scalar.

        With `labels` None: logits [B, T, V]. With `router_weight` the auxiliary losses of the rows are added, so many
        times; `real_tokens` bool [B, T] says then what is no padding. `positions`: see `LossOptions`.
        """
        loss = self.run(input_ids, labels, position_ids, positions)
        if router_weight:
            assert self.router_loss is not None
            assert real_tokens is not None
            loss = loss + router_weight * self.router_loss(real_tokens)
        return loss

    def run(
        self, input_ids: Tensor, labels: Tensor | None, position_ids: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """What `forward` does on one rank; a pipeline puts itself in `forward`'s place and has its last stage do it."""
        forget_documents()
        if labels is None:
            return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        options = replace(self._options, positions=positions, z_loss=self._options.z_loss if self.training else 0.0)
        return self._loss(self.model, input_ids, labels, position_ids, options)


def loss_of_logits(logits: Tensor, labels: Tensor, z_loss: float = 0.0) -> Tensor:
    """[N, V] and labels [N] -> summed loss, float32."""
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    if z_loss:
        loss = loss + z_loss * (logits.logsumexp(dim=-1).square() * (labels != IGNORE)).sum()
    return loss


def cross_entropy(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor, options: LossOptions
) -> Tensor:
    """The reference: all logits at once."""
    # no attention mask: with one, transformers no longer separates packed documents by their position ids
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return loss_of_logits(logits.flatten(0, 1), labels.flatten(), options.z_loss)


def known_positions(labels: Tensor) -> Tensor | None:
    """labels [B, T] on the CPU -> `positions` of `LossOptions`. On a device, to ask would mean to wait for it."""
    found = (labels != IGNORE).flatten().nonzero().flatten()
    return found if len(found) else None


def has_labels(labels: Tensor, options: LossOptions) -> bool:
    """Whether any position of [B, T] has a label."""
    return options.positions is not None or bool((labels != IGNORE).any())


def at_labels(labels: Tensor, options: LossOptions, *rows: Tensor) -> list[Tensor]:
    """What has to pass the head: of labels [B, T], then of each of `rows` [B, T, ...], the N label positions.

    At least one position, a label or not: it keeps the head in the graph, since every rank must take part in every
    gradient reduction.
    """
    positions = options.positions
    if positions is None:
        positions = known_positions(labels)
    if positions is None:
        positions = torch.zeros(1, dtype=torch.long, device=labels.device)
    return [tensor.flatten(0, 1).index_select(0, positions) for tensor in (labels, *rows)]


class Head:
    """Hidden states of `model`'s decoder, and whatever the model itself does behind it (projection, scale, cap)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.decoder = model, find_decoder(model)
        self._output: type | None = None

    def hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[B, T] twice -> [B, T, D]."""
        output = self.decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        self._output = type(output)
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N, V]."""
        assert self._output is not None
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        with decoder_returns(self.decoder, self._output(last_hidden_state=hidden.unsqueeze(0))):
            return self.model(input_ids=tokens, use_cache=False).logits[0]


def chunked(
    model: PreTrainedModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor, options: LossOptions
) -> Tensor:
    """Only label positions pass the head, `chunk_size` at a time, forwards and backwards before the next.

    The head is whatever the model itself does behind its decoder, see `Head`.
    """
    head = Head(model)
    labels, hidden = at_labels(labels, options, head.hidden(input_ids, position_ids))  # [N], [N, D]

    def chunk_loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return token_cross_entropy(head.logits(hidden), labels, options.z_loss)

    return sum_of_chunks(chunk_loss, hidden, labels, options.chunk_size)


@contextmanager
def decoder_returns(decoder: nn.Module, output: Any) -> Iterator[None]:
    """While active, calling `decoder` returns `output`, so that calling the whole model runs just its head.

    Raises `ValueError` where the model did not call it: its loss would be that of something else.
    """
    own = decoder.__dict__.get("forward")
    calls = 0

    def forward(*_: Any, **__: Any) -> Any:
        nonlocal calls
        calls += 1
        return output

    decoder.forward = forward
    try:
        yield
        if not calls:
            raise ValueError(f"the model does not call its {type(decoder).__name__}: use train.loss: cross_entropy")
    finally:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own
