"""The auxiliary loss of a mixture of experts: it keeps the router from sending all tokens to a few experts.

It is the load balancing loss of Switch Transformers (Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equations 4
to 6) in the form transformers gives it (`load_balancing_loss_func`, all layers pooled), taken of each row by itself and
averaged over the rows of the global batch, as DeepSeek-V3 takes its sequence-wise loss
(https://arxiv.org/abs/2412.19437, equations 17 to 20). Taken of a whole micro-batch, as usual, it is a product of two
means over whatever rows happen to be there: another number for every local batch size and mesh.

Shapes: B rows, T tokens of this rank, E experts, K experts of each token.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.structure import find_decoder
from dayzero.errors import ConfigError


def router_loss_coefficient(model: PreTrainedModel, setting: float | None, dims: ParallelDims) -> float:
    """The weight of the auxiliary loss: `setting`, or where it is None what the model's own config says; 0 is off.

    Raises `ConfigError` for a number above 0 where the model has no such loss, or no rank sees what it is made of.
    """
    config = model.config.get_text_config()
    if setting is None:
        own = getattr(config, "router_aux_loss_coef", 0.0) if getattr(config, "output_router_logits", False) else 0.0
        coefficient = float(own) if _has_router_loss(model) else 0.0
    elif setting and not _has_router_loss(model):
        raise ConfigError(
            f"train.router_aux_loss_coef {setting:g}: {type(model).__name__} defines no load balancing loss of router "
            "logits: set 0 or null"
        )
    else:
        coefficient = setting
    parts = {"sequence_parallel": dims.sequence_parallel, "pp": dims.pp > 1}
    if coefficient and any(parts.values()):
        raise ConfigError(
            f"train.router_aux_loss_coef {coefficient:g}: with {' and '.join(k for k, on in parts.items() if on)} no "
            "rank has the router logits of all its tokens in all layers: turn that off, or set the coefficient to 0"
        )
    return coefficient


def _has_router_loss(model: PreTrainedModel) -> bool:
    """Whether the model's own code pools its router logits into transformers' load balancing loss."""
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    arguments = ["gate_logits", "num_experts", "top_k", "attention_mask"]
    return (
        function is not None
        and list(inspect.signature(function).parameters) == arguments
        and isinstance(getattr(model.config.get_text_config(), "num_experts_per_tok", None), int)
    )


class RouterLoss:
    """Collects a model's router logits in each training forward pass and makes the loss of them.

    `group`: the ranks that split the tokens of each row (None: rows are whole).
    """

    def __init__(self, model: PreTrainedModel, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.top_k: int = model.config.get_text_config().num_experts_per_tok
        self._logits: tuple[Tensor, ...] = ()
        self._sum: float | Tensor = 0.0
        decoder = find_decoder(model)
        decoder.config.output_router_logits = True  # type: ignore[union-attr]  # a PreTrainedModel
        decoder.register_forward_hook(self._collect)

    def _collect(self, decoder: nn.Module, _: Any, output: Any) -> None:
        # None: the decoder stood in for by ready-made hidden states, see loss.py
        if decoder.training and getattr(output, "router_logits", None) is not None:
            self._logits = output.router_logits

    def __call__(self, real_tokens: Tensor) -> Tensor:
        """real_tokens bool [B, T], False for padding -> this rank's part of the sum of the rows' losses, float32.

        The parts of the ranks in `group` add up to the sum. Call it once after each training forward pass.
        """
        assert self._logits, "the model recorded no router logits"
        loss = load_balancing_loss(self._logits, real_tokens, self.top_k, self.group).sum()
        self._logits = ()
        self._sum = self._sum + loss.detach()
        return loss

    def take_sum(self) -> float:
        """What this rank's calls returned, added up, since the last time this was asked."""
        taken, self._sum = float(self._sum), 0.0
        return taken


def load_balancing_loss(
    logits: tuple[Tensor, ...], real_tokens: Tensor, top_k: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Router logits [B * T, E] of every layer, real_tokens bool [B, T] -> each row's loss [B], float32.

    E * sum over experts of (assignments to it per token) * (its mean probability), means over layers and real tokens;
    K for perfect balance. A row without tokens has loss 0. With `group` the means are over all its ranks' tokens, and
    the result is this rank's share of a row's loss.
    """
    rows, experts = real_tokens.shape[0], logits[0].shape[-1]
    mask = real_tokens.to(torch.float32).unsqueeze(-1)  # [B, T, 1]
    assigned = logits[0].new_zeros(rows, experts, dtype=torch.float32)
    probability = torch.zeros_like(assigned)
    for layer in logits:
        chances = layer.float().softmax(dim=-1).view(*real_tokens.shape, experts)  # [B, T, E]
        chosen = chances.detach().topk(top_k, dim=-1).indices  # [B, T, K]
        weight = mask.expand(*real_tokens.shape, top_k)
        assigned = assigned.scatter_add(1, chosen.flatten(1), weight.flatten(1))
        probability = probability + (chances * mask).sum(dim=1)
    tokens = mask.sum(dim=1) * len(logits)  # [B, 1]
    if group is not None:
        dist.all_reduce(assigned, group=group)
        dist.all_reduce(tokens, group=group)
    tokens = tokens.clamp(min=1)
    return experts * (assigned / tokens * (probability / tokens)).sum(dim=-1)
