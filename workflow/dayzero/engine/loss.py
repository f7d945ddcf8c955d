"""The loss of a causal language model: sum over label tokens, from input ids to a scalar, in one forward call.

Shapes: B rows, T tokens, D model width, V vocabulary, N label tokens.

Labels are already shifted: `labels[b, t]` is the token that position t has to predict, or -100. A loss is a sum, never
a mean: the trainer divides by the global number of label tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dayzero.engine.router_loss import RouterLoss
from dayzero.engine.structure import find_decoder

IGNORE = -100


class CausalLMWithLoss(nn.Module):
    """A Hugging Face causal LM whose forward call returns the summed loss instead of logits.

    It is the module that FSDP2 or DDP wraps: head and loss run inside its forward call, where the root's weights
    (embedding, LM head) are gathered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        loss: str = "chunked",
        chunk_size: int = 1024,
        router_loss: RouterLoss | None = None,
    ) -> None:
        super().__init__()
        self.model: PreTrainedModel = model
        self.router_loss = router_loss
        self._loss = LOSSES[loss]
        self._chunk_size = chunk_size

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        position_ids: Tensor,
        real_tokens: Tensor | None = None,
        router_weight: float = 0.0,
    ) -> Tensor:
        """input_ids, labels, position_ids [B, T] -> sum of token losses, float32 scalar.

        With `labels` None: logits [B, T, V]. With `router_weight` the auxiliary losses of the rows are added, so many
        times; `real_tokens` bool [B, T] says then what is no padding.
        """
        loss = self.run(input_ids, labels, position_ids)
        if router_weight:
            assert self.router_loss is not None
            assert real_tokens is not None
            loss = loss + router_weight * self.router_loss(real_tokens)
        return loss

    def run(self, input_ids: Tensor, labels: Tensor | None, position_ids: Tensor) -> Tensor:
        """What `forward` does on one rank; a pipeline puts itself in `forward`'s place and has its last stage do it."""
        if labels is None:
            return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return self._loss(self.model, input_ids, labels, position_ids, self._chunk_size)


def cross_entropy(model: nn.Module, input_ids: Tensor, labels: Tensor, position_ids: Tensor, _: int) -> Tensor:
    """The reference: all logits at once."""
    # no attention mask: with one, transformers no longer separates packed documents by their position ids
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")


def chunked(model: nn.Module, input_ids: Tensor, labels: Tensor, position_ids: Tensor, chunk_size: int) -> Tensor:
    """Only label positions pass the head, `chunk_size` at a time; their logits are computed again in the backward pass.

    The head is whatever the model itself does behind its decoder (projection, scale, cap), see `decoder_returns`.
    """
    decoder = find_decoder(model)
    output = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    hidden = output.last_hidden_state  # [B, T, D]
    supervised = labels != IGNORE
    if not supervised.any():
        # one ignored position keeps the head in the graph: every rank must take part in every gradient reduction
        supervised = torch.zeros_like(supervised)
        supervised[0, 0] = True
    hidden, labels = hidden[supervised], labels[supervised]  # [N, D], [N]

    def chunk_loss(hidden: Tensor, labels: Tensor) -> Tensor:
        with decoder_returns(decoder, type(output)(last_hidden_state=hidden.unsqueeze(0))):
            logits = model(input_ids=labels.clamp(min=0).unsqueeze(0), use_cache=False).logits[0]
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for h, y in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True):
        total = total + checkpoint(chunk_loss, h, y, use_reentrant=False)
    return total


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


LOSSES: dict[str, Callable[[nn.Module, Tensor, Tensor, Tensor, int], Tensor]] = {
    "chunked": chunked,
    "cross_entropy": cross_entropy,
}
