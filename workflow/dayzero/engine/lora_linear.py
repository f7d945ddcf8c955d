"""A linear module and its LoRA adapter as one operation, with fewer passes over the activations than PEFT's.

PEFT computes x W', then x A', then that times B', multiplies by the scale and adds: three tensors as large as the
output, and as many again backwards. Here one of the two products is added to the other where it lies, which a matrix
product can do; the scale goes onto the small matrix between A and B, and the two gradients of x are one. A frozen
weight may be kept in 8 bits (see `float8.py`); the adapter is computed in x's own dtype then too. Modules that take the
same x (queries, keys and values, say) are one operation together (see `lora_groups.py`).

Shapes: N tokens, I width in, O width out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from dayzero.engine.float8 import WEIGHT, FrozenFloat8Linear, factors_backward, factors_forward, product, to_float8
from dayzero.engine.lora import ADAPTER


class _LinearsWithAdapters(torch.autograd.Function):
    """x [N, I] -> x W' + b + scale (x A') B' of every one of several linear modules, for frozen W [O, I] and b [O]; A
    [R, I], B [O, R].

    The products with A and the sum of x's gradients are joint ones. `scale` is the same for all, and so is whether W is
    in 8 bits, whose products `emulate` says how to make. `tensors`: those of `Operands`, one module's after another's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, emulate: bool, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        all_operands = _operands(tensors)
        a = _joined([o.a for o in all_operands])
        between = F.linear(x, a) * scale  # [N, sum of R]
        parts = between.split([len(o.a) for o in all_operands], dim=1)
        in_float8 = all_operands[0].weight_scale is not None
        codes = to_float8(x, WEIGHT, by_row=all_operands[0].weight_scale.ndim > 0) if in_float8 else None
        outputs = []
        for o, part in zip(all_operands, parts, strict=True):
            if codes is None:
                out = sum_of_products([x], [o.weight.t()], part, o.b.t(), o.bias)
            else:
                factors = factors_forward(*codes, o.weight, o.weight_scale)
                out = sum_with_float8(*factors, part, o.b.t(), o.bias, True, emulate)
            outputs.append(out)
        weights = [o.weight if o.for_gradient is None else o.for_gradient for o in all_operands]
        of_each = zip(weights, (o.weight_scale for o in all_operands), (o.b for o in all_operands), strict=True)
        ctx.save_for_backward(x, a, between, *(tensor for three in of_each for tensor in three))
        ctx.ranks, ctx.scale, ctx.emulate = [len(o.a) for o in all_operands], scale, emulate
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, a, between, *rest = ctx.saved_tensors
        weights, scales, bs = rest[::3], rest[1::3], rest[2::3]
        of_between = _joined([g @ b for g, b in zip(gradients, bs, strict=True)], dim=1) * ctx.scale  # [N, sum of R]
        of_x = None
        if ctx.needs_input_grad[0]:
            if scales[0] is None:
                of_x = sum_of_products(list(gradients), weights, of_between, a, None)  # [N, I]
            else:
                first, *others = [factors_backward(*triple) for triple in zip(gradients, weights, scales, strict=True)]
                of_x = sum_with_float8(*first, of_between, a, None, False, ctx.emulate)
                for factors in others:
                    of_x = of_x + product(*factors, x.dtype, ctx.emulate)
        of_a = (of_between.t() @ x).split(ctx.ranks)
        of_b = [g.t() @ part for g, part in zip(gradients, between.split(ctx.ranks, dim=1), strict=True)]
        of_tensors = [t for pair in zip(of_a, of_b, strict=True) for t in (None, None, None, None, *pair)]
        return of_x, None, None, *of_tensors


class Operands(NamedTuple):
    """What one linear module multiplies by, and adds."""

    weight: Any
    for_gradient: Any
    """The weight as the backward pass shall take it; None where that is as it is (a compiler stops at a Function that
    is given one tensor twice)."""
    weight_scale: Any
    """Of a weight in 8 bits; None where it is of x's dtype."""
    bias: Any
    a: Any
    b: Any


def _operands(tensors: Sequence[Tensor | None]) -> list[Operands]:
    size = len(Operands._fields)
    return [Operands(*tensors[at : at + size]) for at in range(0, len(tensors), size)]


def _joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=dim)


# Operations of their own, which a compiler leaves whole: it would copy what is added to (seen in torch 2.11 and 2.13),
# and that of torch 2.11 takes what a Function has written into for a constant, whose gradients are zero.


@torch.library.custom_op("dayzero::sum_of_products", mutates_args=())
def sum_of_products(a: list[Tensor], b: list[Tensor], c: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
    """The sum of all a b, and c d + bias, for thin c and d.

    The large products come last on a GPU. On a CPU one may round to bfloat16 between parts of its sum, so there they
    begin: gradients were twice as far from float64's the other way round.
    """
    pairs = list(zip(a, b, strict=True))
    if a[0].is_cuda:
        out = c @ d if bias is None else torch.addmm(bias, c, d)
    else:
        first = pairs.pop(0)
        out = torch.mm(*first) if bias is None else torch.addmm(bias, *first)
    for pair in pairs:
        out.addmm_(*pair)
    return out if a[0].is_cuda else out.addmm_(c, d)


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
def _(a: list[Tensor], b: list[Tensor], c: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
    return c.new_empty(c.shape[0], d.shape[1])


@sum_with_float8.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, c: Tensor, *_: Any) -> Tensor:
    return c.new_empty(a.shape[0], b.shape[1])


class FusedLoraLinear(LoraLinear):
    """PEFT's module with `_LinearsWithAdapters` as its forward call wherever that computes the same."""

    shared: SharedInput | None = None
    """What it and others take alike; see `lora_groups.py`."""
    place = 0
    """Which of those it is."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., I] -> [..., O]."""
        if args or kwargs or not self.fits(x):
            return super().forward(x, *args, **kwargs)
        return linears_with_adapters([self], x)[0] if self.shared is None else self.shared.output(self, x)

    def fits(self, x: Tensor) -> bool:
        """Whether the fused operation computes what PEFT would."""
        base: Any = self.base_layer
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        in_float8 = isinstance(base, FrozenFloat8Linear)
        same = x.dtype == a.dtype == b.dtype and (in_float8 or base.weight.dtype == x.dtype)
        same = same and not torch.is_autocast_enabled(x.device.type) and not (in_float8 and base.plain)
        return same and not self.disable_adapters and not self.merged

    def operands(self) -> Operands:
        """What the fused operation takes of this module."""
        base: Any = self.base_layer
        in_float8 = isinstance(base, FrozenFloat8Linear)
        weight, for_gradient = base.weights if in_float8 else (base.weight, None)
        scale = base.weight_scale if in_float8 else None
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        return Operands(weight, for_gradient, scale, base.bias, a, b)


def linears_with_adapters(modules: Sequence[FusedLoraLinear], x: Tensor) -> list[Tensor]:
    """x [..., I] through each of `modules`, for which it `fits` -> [..., O] each."""
    scale, base = modules[0].scaling[ADAPTER], modules[0].base_layer
    emulate = isinstance(base, FrozenFloat8Linear) and base.emulate
    # flattened out here: some models write into what they get, which autograd forbids for a Function's own views
    flat = x.reshape(-1, x.shape[-1])
    outputs = _LinearsWithAdapters.apply(flat, scale, emulate, *(t for m in modules for t in m.operands()))
    return [out.view(*x.shape[:-1], out.shape[-1]) for out in outputs]  # x may have no rows, so no -1


class SharedInput:
    """Linear modules that are called one after the other with the same tensor: the first call computes for all."""

    def __init__(self, modules: Sequence[FusedLoraLinear]) -> None:
        self.modules = list(modules)
        self.x: Tensor | None = None
        self.outputs: list[Tensor] = []
        """Of x, by all modules but the first, until the last is called."""
        for place, module in enumerate(modules):
            module.shared, module.place = self, place

    def output(self, module: FusedLoraLinear, x: Tensor) -> Tensor:
        """What `module` makes of x."""
        # by its place: a compiler that compares modules compiles anew for each
        if module.place == 0 and all(m.fits(x) for m in self.modules):
            out, *self.outputs = linears_with_adapters(self.modules, x)
            self.x = x
            return out
        if self.x is x:
            found = self.outputs[module.place - 1]
            if module.place == len(self.modules) - 1:
                self.x, self.outputs = None, []
            return found
        return linears_with_adapters([module], x)[0]


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
