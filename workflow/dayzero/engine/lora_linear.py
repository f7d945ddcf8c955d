"""A linear module and its LoRA adapter as one operation, with fewer passes over the activations than PEFT's.

PEFT computes x W', then x A', then that times B', multiplies by the scale and adds: three tensors as large as the
output, and as many again backwards. Here the adapter's product is added into the output where it is made (a matrix
product can do that), the scale goes onto the small matrix between A and B, and the two gradients of x are one. A frozen
weight may be kept in 8 bits (see `float8.py`); the adapter is computed in x's own dtype then too.

Shapes: N tokens, I width in, O width out, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from dayzero.engine.float8 import FrozenFloat8Linear, gradient_through_frozen, through_frozen
from dayzero.engine.lora import ADAPTER


class _LinearWithAdapter(torch.autograd.Function):
    """x [N, I] -> x W' + b + scale (x A') B', for a frozen W [O, I] and b [O]; A [R, I], B [O, R].

    `weight_scale`: of a W in 8 bits, whose products `emulate` says how to make; None where W is of x's dtype.
    `for_gradient`: W as the backward pass shall take it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        for_gradient: Tensor,
        weight_scale: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        emulate: bool,
    ) -> Tensor:
        out = F.linear(x, weight) if weight_scale is None else through_frozen(x, weight, weight_scale, emulate)
        if bias is not None:
            out = out + bias if torch.compiler.is_compiling() else out.add_(bias)
        between = F.linear(x, a) * scale  # [N, R]
        out = _plus_product(out, between, b.t())
        ctx.save_for_backward(x, for_gradient, weight_scale, a, b, between)
        ctx.scale, ctx.emulate = scale, emulate
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, weight_scale, a, b, between = ctx.saved_tensors
        (gradient,) = gradients  # [N, O]
        of_between = (gradient @ b) * ctx.scale  # [N, R]
        of_x = None
        if ctx.needs_input_grad[0]:
            if weight_scale is None:
                of_x = gradient @ weight  # [N, I]
            else:
                of_x = gradient_through_frozen(gradient, weight, weight_scale, ctx.emulate)
            of_x = _plus_product(of_x, of_between, a)
        of_a = of_between.t() @ x if ctx.needs_input_grad[5] else None
        of_b = gradient.t() @ between if ctx.needs_input_grad[6] else None
        return of_x, None, None, None, None, of_a, of_b, None, None


def _plus_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out + a b in the place of `out`. A compiler finds the place by itself; that of torch 2.11 takes what a Function
    has written into for a constant, and all gradients are zero then."""
    return out.addmm(a, b) if torch.compiler.is_compiling() else out.addmm_(a, b)


class FusedLoraLinear(LoraLinear):
    """PEFT's module with `_LinearWithAdapter` as its forward call wherever that computes the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., I] -> [..., O]."""
        base: Any = self.base_layer
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        in_float8 = isinstance(base, FrozenFloat8Linear)
        same = x.dtype == a.dtype == b.dtype and (in_float8 or base.weight.dtype == x.dtype)
        same = same and not torch.is_autocast_enabled(x.device.type)
        if args or kwargs or not same or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        frozen = (*base.weights, base.weight_scale) if in_float8 else (base.weight, base.weight, None)
        # flattened out here: some models write into what they get, which autograd forbids for a Function's own views
        flat, scale = x.reshape(-1, x.shape[-1]), self.scaling[ADAPTER]
        out = _LinearWithAdapter.apply(flat, *frozen, base.bias, a, b, scale, in_float8 and base.emulate)
        return out.view(*x.shape[:-1], -1)


def fuse_lora(model: nn.Module) -> int:
    """Let every adapted linear module of `model` that has nothing but a plain adapter use the fused operation.

    For models whose matrices are whole where they are used: tensor parallelism and deferred gradients act on the
    modules inside PEFT's. Returns how many modules there are.
    """
    fused = 0
    for module in model.modules():
        if type(module) is LoraLinear and _is_plain(module):
            module.__class__ = FusedLoraLinear
            fused += 1
    return fused


def _is_plain(module: LoraLinear) -> bool:
    """Whether it is x W' + b with one adapter and no more: no dropout, DoRA, adapter bias or packed weight."""
    base = module.base_layer
    parts = (module.lora_A, module.lora_B)
    return (
        (isinstance(base, FrozenFloat8Linear) or (type(base) is nn.Linear and type(base.weight) is nn.Parameter))
        and not any(p.requires_grad for p in base.parameters())
        and list(module.active_adapters) == [ADAPTER]
        and all(list(part) == [ADAPTER] and type(part[ADAPTER]) is nn.Linear for part in parts)
        and all(part[ADAPTER].bias is None for part in parts)
        and ADAPTER not in module.lora_variant
        and isinstance(module.lora_dropout[ADAPTER], nn.Identity)
        and not getattr(module, "fan_in_fan_out", False)
    )
