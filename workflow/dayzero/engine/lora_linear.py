"""A linear module and its LoRA adapter as one operation, with fewer passes over the activations than PEFT's.

PEFT computes x W', then x A', then that times B', multiplies by the scale and adds: three tensors as large as the
output, and as many again backwards. Here the adapter's product is added into the output where it is made (a matrix
product can do that), the scale goes onto the small matrix between A and B, and the two gradients of x are one.

Shapes: N tokens, I width in, O width out, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from dayzero.engine.lora import ADAPTER


class _LinearWithAdapter(torch.autograd.Function):
    """x [..., I] -> x W' + b + scale (x A') B', for a frozen W [O, I] and b [O]; A [R, I], B [O, R]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [N, I]
        out = F.linear(x, weight)  # no view, as it were with the bias: some models write into it
        if bias is not None:
            out += bias
        between = F.linear(flat, a) * scale  # [N, R]
        out.view(-1, out.shape[-1]).addmm_(between, b.t())
        ctx.save_for_backward(flat, weight, a, b, between)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, between = ctx.saved_tensors
        (gradient,) = gradients
        shape = gradient.shape[:-1]
        gradient = gradient.reshape(-1, gradient.shape[-1])  # [N, O]
        of_between = (gradient @ b) * ctx.scale  # [N, R]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ weight  # [N, I]
            of_x = of_x.addmm_(of_between, a).view(*shape, -1)
        of_a = of_between.t() @ flat if ctx.needs_input_grad[3] else None
        of_b = gradient.t() @ between if ctx.needs_input_grad[4] else None
        return of_x, None, None, of_a, of_b, None


class FusedLoraLinear(LoraLinear):
    """PEFT's module with `_LinearWithAdapter` as its forward call wherever that computes the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., I] -> [..., O]."""
        base, a, b = self.base_layer, self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        same = x.dtype == base.weight.dtype == a.dtype == b.dtype
        same = same and not torch.is_autocast_enabled(x.device.type)
        if args or kwargs or not same or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        return _LinearWithAdapter.apply(x, base.weight, base.bias, a, b, self.scaling[ADAPTER])


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
    """Whether it is x W' + b with one adapter and no more: no dropout, DoRA, adapter bias or quantised weight."""
    base = module.base_layer
    parts = (module.lora_A, module.lora_B)
    return (
        type(base) is nn.Linear
        and type(base.weight) is nn.Parameter
        and not any(p.requires_grad for p in base.parameters())
        and list(module.active_adapters) == [ADAPTER]
        and all(list(part) == [ADAPTER] and type(part[ADAPTER]) is nn.Linear for part in parts)
        and all(part[ADAPTER].bias is None for part in parts)
        and ADAPTER not in module.lora_variant
        and isinstance(module.lora_dropout[ADAPTER], nn.Identity)
        and not getattr(module, "fan_in_fan_out", False)
    )
