"""A linear module and its LoRA adapter as one operation, with fewer passes over the activations than PEFT's.

PEFT computes x W', then x A', then that times B', multiplies by the scale and adds: three tensors as large as the
output, and as many again backwards. Here one of the two products is added to the other where it lies, which a matrix
product can do; the scale goes onto the small matrix between A and B, and the two gradients of x are one. A frozen
weight may be kept in 8 bits (see `float8.py`); the adapter is computed in x's own dtype then too.

Shapes: N tokens, I width in, O width out, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from dayzero.engine.float8 import FrozenFloat8Linear, factors_backward, factors_forward, product
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
        between = F.linear(x, a) * scale  # [N, R]
        if weight_scale is None:
            out = sum_of_products(x, weight.t(), between, b.t(), bias)
        else:
            out = sum_with_float8(*factors_forward(x, weight, weight_scale), between, b.t(), bias, True, emulate)
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
                of_x = sum_of_products(gradient, weight, of_between, a, None)  # [N, I]
            else:
                factors = factors_backward(gradient, weight, weight_scale)
                of_x = sum_with_float8(*factors, of_between, a, None, False, ctx.emulate)
        of_a = of_between.t() @ x if ctx.needs_input_grad[5] else None
        of_b = gradient.t() @ between if ctx.needs_input_grad[6] else None
        return of_x, None, None, None, None, of_a, of_b, None, None


# Operations of their own, which a compiler leaves whole: it would copy what is added to (seen in torch 2.11 and 2.13),
# and that of torch 2.11 takes what a Function has written into for a constant, whose gradients are zero.


@torch.library.custom_op("dayzero::sum_of_products", mutates_args=())
def sum_of_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
    """a b + c d + bias, for thin c and d.

    The large product comes last on a GPU. On a CPU it may round to bfloat16 between parts of its sum, so there it
    begins: gradients were twice as far from float64's the other way round.
    """
    if a.is_cuda:
        return (c @ d if bias is None else torch.addmm(bias, c, d)).addmm_(a, b)
    return (a @ b if bias is None else torch.addmm(bias, a, b)).addmm_(c, d)


@torch.library.custom_op("dayzero::sum_with_float8", mutates_args=())
def sum_with_float8(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    c: Tensor,
    d: Tensor,
    bias: Tensor | None,
    fast: bool,
    emulate: bool,
) -> Tensor:
    """a b + c d + bias, for a and b in 8 bits (see `product`) and thin c and d."""
    out = product(a, a_scale, b, b_scale, c.dtype, emulate, fast=fast).addmm_(c, d)
    return out if bias is None else out.add_(bias)


@sum_of_products.register_fake
def _(a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
    return c.new_empty(a.shape[0], b.shape[1])


@sum_with_float8.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, c: Tensor, *_: Any) -> Tensor:
    return c.new_empty(a.shape[0], b.shape[1])


class FusedLoraLinear(LoraLinear):
    """PEFT's module with `_LinearWithAdapter` as its forward call wherever that computes the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., I] -> [..., O]."""
        base: Any = self.base_layer
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        in_float8 = isinstance(base, FrozenFloat8Linear)
        same = x.dtype == a.dtype == b.dtype and (in_float8 or base.weight.dtype == x.dtype)
        same = same and not torch.is_autocast_enabled(x.device.type) and not (in_float8 and base.plain)
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
