"""How many floating-point operations a training step needs: one formula for any architecture, from its structure.

A multiply-add counts as two. For one token that passes a matrix W of `n` elements:

    forward 2n  +  gradient of its input 2n, if something before it is trained  +  gradient of W 2n, if W is trained

Summed over a dense model that trains everything this is the familiar 6N a token (Kaplan et al. 2020,
https://arxiv.org/abs/2001.08361, section 2.1), with LoRA about 4N: the frozen weights' own gradients are left out. Of a
mixture's experts only the K chosen ones of E count, n K / E. An embedding is looked up, not multiplied; a tied one
counts as the head that it is too. What lies behind the decoder (the head) counts for label positions only, since the
others' logits decide nothing.

Attention adds for every pair of a position and one that it sees, in each layer, with H query heads (grouped key and
value heads are no fewer products) of width d for queries and keys and e for values:

    scores 2Hd + values 2He, and backwards 2He twice and 2Hd twice (FlashAttention-2 counts the same,
    https://arxiv.org/abs/2307.08691, section 4.1)

The pairs are those of causal attention within each packed document, within the sliding window if there is one: the sum
of min(position + 1, window), not T squared. Left out: norms, activations, state-space scans, convolutions, padding,
and whatever is computed a second time (activation checkpointing, chunked losses): the operations that the model needs,
not those that a machine happens to do.

Shapes: B rows, T tokens, H heads, D model width, N tokens, K chosen of E experts.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dayzero.engine.expert_parallel import find_experts
from dayzero.engine.pipeline_cut import AnyValue
from dayzero.engine.structure import find_decoder, find_layers

_TOKENS = 16
_NAME = "dayzero_count"
_COUNTING: ContextVar[_Count] = ContextVar("_COUNTING")


@dataclass
class StepFlops:
    """What one token, label and visible pair cost in a step of training, forward and backward."""

    per_token: float = 0.0
    per_label: float = 0.0
    """Of what lies behind the decoder."""
    per_pair: dict[int | None, float] = field(default_factory=lambda: defaultdict(float))
    """Sliding window (None: all that came before) -> operations for a pair, over all layers with that window."""

    def of(self, num_tokens: float, num_labels: float, pairs: Mapping[int | None, float]) -> float:
        """Operations of a step; `pairs`: visible pairs by window, see `visible_pairs`."""
        attention = sum(cost * pairs[window] for window, cost in self.per_pair.items())
        return self.per_token * num_tokens + self.per_label * num_labels + attention

    def of_batch(self, micro_batches: Iterable[Mapping[str, Tensor]], num_labels: int) -> float:
        """The same of micro-batches with `position_ids` [B, T] and `lengths` [B]."""
        tokens, pairs = 0, dict.fromkeys(self.per_pair, 0)
        for micro in micro_batches:
            positions, lengths = micro["position_ids"], micro["lengths"]
            real = torch.arange(positions.shape[1], device=positions.device) < lengths.unsqueeze(1)
            tokens += int(lengths.sum())
            for window in pairs:
                pairs[window] += visible_pairs(positions[real], window)
        return self.of(tokens, num_labels, pairs)


def visible_pairs(position_ids: Tensor, window: int | None = None) -> int:
    """How many (position, position it sees) pairs there are, given each token's place in its document."""
    seen = position_ids + 1
    return int((seen if window is None else seen.clamp(max=window)).sum())


def count_flops(model: PreTrainedModel) -> StepFlops:
    """What training `model` (on the meta device, with its adapters, parameters to train marked) costs.

    A copy is run once without values: which matrices a token passes, how often, and what needs a gradient is seen, not
    looked up. Where an architecture does not run so, every linear module counts once.
    """
    for dtype in (torch.float32, torch.bfloat16):  # some kernels know only one of the two on the meta device
        try:
            return _Count(model, dtype).by_running()
        except Exception:  # noqa: S112 - whatever the model's own code raises
            continue
    return _Count(model, torch.float32).by_structure()


class _Count:
    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self.model: PreTrainedModel = copy.deepcopy(model).to(dtype).eval()  # type: ignore[arg-type]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.flops = StepFlops()
        try:
            self.inside = {id(m) for m in find_decoder(self.model).modules()}
        except ValueError:
            self.inside = {id(m) for m in self.model.modules()}

    def by_running(self) -> StepFlops:
        experts = find_experts(self.model)
        wrapped = [m for m in self.model.modules() if isinstance(m, ParamWrapper)]
        adapters = {id(m) for wrapper in wrapped for m in wrapper.modules() if isinstance(m, nn.Linear)}
        for module in experts.values():
            around = [w for w in wrapped if w.get_base_layer() is module]
            module.forward = _Experts(self, module, around)
            for wrapper in around:
                wrapper.forward = wrapper.base_layer.__call__  # type: ignore[method-assign]
        for module in self.model.modules():
            if _is_matrix(module) and id(module) not in adapters:
                module.register_forward_pre_hook(self._matrix, with_kwargs=True)
        if getattr(self.model, "_supports_attention_backend", False):
            self.model.set_attn_implementation(_NAME)
        ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
        with torch.device("meta"), AnyValue(), torch.enable_grad():
            token = _COUNTING.set(self)
            try:
                self.model(input_ids=ids, use_cache=False)
            finally:
                _COUNTING.reset(token)
        if not self.flops.per_pair:
            self._attention_by_config()
        return self.flops

    def by_structure(self) -> StepFlops:
        for module in self.model.modules():
            if _is_matrix(module):
                weight = cast(Tensor, module.weight)
                self._add(module, weight.numel(), 1.0, True, weight.requires_grad)
        config = self.model.config.get_text_config(decoder=True)
        share = getattr(config, "num_experts_per_tok", None)
        for module in find_experts(self.model).values():
            for parameter in module.parameters():
                k_of_e = share / parameter.shape[0] if share else 1.0
                self._add(module, parameter.numel(), k_of_e, True, parameter.requires_grad)
        self._attention_by_config()
        return self.flops

    def _add(self, module: nn.Module, size: int, times: float, input_trained: bool, weight_trained: bool) -> None:
        cost = 2.0 * size * times * (1 + input_trained + weight_trained)
        if id(module) in self.inside:
            self.flops.per_token += cost
        else:
            self.flops.per_label += cost

    def _matrix(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        weight = cast(Tensor, module.weight)
        width = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]
        self._add(module, weight.numel(), x.numel() / width / _TOKENS, x.requires_grad, weight.requires_grad)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None) -> None:
        """query [1, H, T, d], key, value [1, G, T, d or e]."""
        heads, d, e = query.shape[1], query.shape[-1], value.shape[-1]
        scores_trained = query.requires_grad + key.requires_grad
        products = d * (1 + scores_trained) + e * (1 + value.requires_grad + (scores_trained > 0))
        self.flops.per_pair[window] += 2.0 * heads * products

    def _attention_by_config(self) -> None:
        """For attention that does not go through transformers' interface."""
        config = self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_attention_heads", None)
        if heads:
            width = getattr(config, "head_dim", None) or config.hidden_size // heads
            self.flops.per_pair[None] += len(find_layers(self.model)) * 12.0 * heads * width


class _Experts:
    """Stands in for experts: says what they cost, and returns something of the right shape and gradient."""

    def __init__(self, count: _Count, module: nn.Module, adapters: list[ParamWrapper]) -> None:
        self.count, self.module = count, module
        self.parameters = list(module.parameters())
        self.adapters = [p for a in adapters for name, p in a.named_parameters() if "lora_" in name]
        self.experts = next(p.shape[0] for p in self.parameters if p.ndim == 3)

    def __call__(self, hidden: Tensor, chosen: Tensor, weights: Tensor, *_: Any, **__: Any) -> Tensor:
        share = hidden.shape[:-1].numel() / _TOKENS * chosen.shape[-1] / self.experts
        trained = hidden.requires_grad or any(p.requires_grad for p in self.adapters + self.parameters)
        for parameter in self.parameters:
            if parameter.ndim == 3:
                # between the two matrices of an expert something is trained where either or the input is
                self.count._add(self.module, parameter.numel(), share, trained, parameter.requires_grad)
        for parameter in self.adapters:
            self.count._add(self.module, parameter.numel(), share, trained, parameter.requires_grad)
        out = hidden * weights.sum()
        return out + sum(p.sum() for p in self.adapters + self.parameters if p.requires_grad)


def _is_matrix(module: nn.Module) -> bool:
    """Linear modules, and others (routers) that multiply by a two-dimensional weight; an embedding looks up."""
    weight = module._parameters.get("weight")  # its own: an adapted module passes on that of the one inside it
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _attention(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, *__: Any, sliding_window: int | None = None, **___: Any
) -> tuple[Tensor, None]:
    """In attention's place: counts it, and returns [1, T, H, e] with the gradient that attention would have."""
    _COUNTING.get().attend(query, key, value, sliding_window)
    out = query.transpose(1, 2).sum(-1, keepdim=True) + key.sum() + value.sum()
    return out.expand(*out.shape[:-1], value.shape[-1]).contiguous(), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
