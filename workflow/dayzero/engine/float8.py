"""FP8 training: matrix products of 8-bit floats (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433).

The linear layers inside the model's layers are converted, not the head, embeddings, adapters or experts.

- Weights that are trained stay as they are and are cast with one scale a tensor, or a row, in every step, by torchao
  or by transformer-engine (see `transformer_engine.py`).
- Weights that are frozen (LoRA) never change, so they are quantised once, when they are loaded, and only their 8 bits
  are kept: whole on every rank, which needs no gathering (on a GPU twice, see `FrozenFloat8Linear`).

Shapes: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dayzero.config import Fp8
from dayzero.engine.requirements import require_package
from dayzero.engine.sharded import like
from dayzero.engine.structure import find_layers
from dayzero.engine.transformer_engine import require_transformer_engine, swap_linears
from dayzero.errors import ConfigError

MULTIPLE = 16
"""What both sizes of a weight must be multiples of, for the hardware's products of 8-bit floats."""

CAPABILITY = (8, 9)
"""The first NVIDIA GPUs that have them: Ada, then Hopper (9, 0)."""

WEIGHT = torch.float8_e4m3fn
SHOWN = 4
"""Modules named in a message."""


def require_float8(fp8: Fp8) -> None:
    """Raise `ConfigError` where this machine cannot train as `fp8` says; starts nothing."""
    if fp8.backend == "transformer_engine":
        require_transformer_engine(fp8.recipe)
    if not fp8.emulate and not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= CAPABILITY):
        raise ConfigError(
            "train.fp8 needs an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell), and torch sees "
            "none here: set train.fp8.emulate to try its rounding slowly, or train.fp8 to null"
        )


def convert_to_float8(model: PreTrainedModel, fp8: Fp8) -> None:
    """Let the linear layers of the meta-device `model` compute in 8 bits, in place, before it is sharded.

    Raises `ConfigError` naming the modules whose sizes are not multiples of 16, or a name to skip that skips nothing.
    """
    linears = dict(_linears(model))
    for name in fp8.skip:
        if not any(_is_named(linear, name) for linear in linears):
            last = sorted({_last(n) for n in linears})
            raise ConfigError(
                f"train.fp8.skip {name!r} names no linear layer that would be converted: those of this model are "
                + ", ".join(last)
            )
    found = {n: m for n, m in linears.items() if not any(_is_named(n, name) for name in fp8.skip)}
    odd = {n: m for n, m in found.items() if m.in_features % MULTIPLE or m.out_features % MULTIPLE}
    if odd:
        first = list(odd.items())[:SHOWN]
        shown = ", ".join(f"{_plain(n)} {m.out_features} x {m.in_features}" for n, m in first)
        more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
        raise ConfigError(
            f"train.fp8: sizes that are not multiples of {MULTIPLE}: {shown}{more}: leave them out by name, "
            f"train.fp8.skip: {sorted({_last(n) for n in odd})}"
        )
    if not found:
        raise ConfigError("train.fp8: no linear layer is left to convert: set it to null")
    if fp8.backend == "transformer_engine":
        swap_linears(model, found)
        return
    frozen = {name for name, m in found.items() if not m.weight.requires_grad}
    for name in frozen:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, FrozenFloat8Linear(found[name], fp8))
    trained = set(found) - frozen
    if fp8.all_gather and not trained:
        raise ConfigError("train.fp8.all_gather: frozen weights are not gathered at all: turn it off")
    if trained:
        _convert_trained(model, fp8, trained)


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    names = {id(module): name for name, module in model.named_modules()}
    for layer in find_layers(model):
        for inner, module in layer.named_modules():
            name = f"{names[id(layer)]}.{inner}"
            if type(module) is nn.Linear and "lora_" not in name:
                yield name, module


def _plain(name: str) -> str:
    """What a linear is called in the model without adapters."""
    return name.removesuffix(".base_layer")


def _last(name: str) -> str:
    return _plain(name).rpartition(".")[2]


def _is_named(name: str, given: str) -> bool:
    return given in (name, _plain(name)) or _plain(name).endswith(f".{given}")


def _convert_trained(model: PreTrainedModel, fp8: Fp8, names: set[str]) -> None:
    require_package("train.fp8 of weights that are trained", "torchao", "set train.fp8 to null")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    config = Float8LinearConfig.from_recipe_name(fp8.recipe)
    # the product for a weight's gradient sums over tokens, whose number need not be a multiple of 16
    config = replace(config, emulate=fp8.emulate, pad_inner_dim=not fp8.emulate)
    if fp8.all_gather:
        config = replace(config, enable_fsdp_float8_all_gather=True)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in names)


class FrozenFloat8Linear(nn.Module):
    """x W^T + b with W [O, I] quantised once; gradients flow to x alone.

    On a GPU the codes are kept twice, by rows and by columns: its products take the second factor by columns only, and
    to turn W in every backward pass took a tenth of a step.
    """

    weight_float8: Tensor
    weight_scale: Tensor
    weight_by_columns: Tensor | None
    """[I, O], the codes turned; None where products are emulated."""
    plain = False
    """Whether x is multiplied as it is, see `plain_products`."""

    def __init__(self, linear: nn.Linear, fp8: Fp8) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.by_row, self.emulate = fp8.recipe == "rowwise", fp8.emulate
        scales = (self.out_features, 1) if self.by_row else ()
        device = linear.weight.device
        # not parameters: they are neither trained nor sharded nor saved
        codes = torch.empty(linear.weight.shape, dtype=WEIGHT, device=device)
        self.register_buffer("weight_float8", codes, persistent=False)
        self.register_buffer("weight_scale", torch.empty(scales, device=device), persistent=False)
        turned = None if self.emulate else torch.empty_like(codes.t(), memory_format=torch.contiguous_format)
        self.register_buffer("weight_by_columns", turned, persistent=False)
        self.bias = linear.bias

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> None:
        """Take the values of `weight` [O, I]."""
        codes, scale = to_float8(weight, WEIGHT, by_row=self.by_row)
        self.weight_float8.copy_(codes)
        self.weight_scale.copy_(scale)
        if self.weight_by_columns is not None:
            self.weight_by_columns.copy_(codes.t())

    @property
    def weights(self) -> tuple[Tensor, Tensor | None]:
        """The codes [O, I] for a forward product, and as a backward one takes them; None where that is as they are."""
        turned = self.weight_by_columns
        return self.weight_float8, None if turned is None else turned.t()

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.plain:
            weight = self.weight_float8.float() * self.weight_scale
            return nn.functional.linear(x, weight.to(x.dtype), self.bias)
        out = _FrozenProduct.apply(x.flatten(0, -2), *self.weights, self.weight_scale, self.emulate)
        out = out.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _FrozenProduct(torch.autograd.Function):
    """x [N, I] times a quantised W^T [I, O]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, for_gradient: Tensor | None, scale: Tensor, emulate: bool
    ) -> Tensor:
        ctx.save_for_backward(weight if for_gradient is None else for_gradient, scale)
        ctx.emulate = emulate
        codes = to_float8(x, WEIGHT, by_row=scale.ndim > 0)
        return product(*factors_forward(*codes, weight, scale), x.dtype, emulate, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        of_x = product(*factors_backward(gradient, *ctx.saved_tensors), gradient.dtype, ctx.emulate)
        return of_x, None, None, None, None


Factors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Codes and scale of one factor, then of the other, as `product` takes them."""


def factors_forward(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor) -> Factors:
    """Of x W', for the codes `x` [N, I] and `weight` [O, I] with their scales (one, or one a row)."""
    return x, x_scale, weight.t(), scale.t() if scale.ndim else scale


def factors_backward(gradient: Tensor, weight: Tensor, scale: Tensor) -> Factors:
    """Of the gradient of x, for that of x W' [N, O]."""
    if not scale.ndim:
        return *to_float8(gradient, torch.float8_e5m2, by_row=False), weight, scale
    # summed over outputs, each of which has a scale: they go into the gradient before it is rounded
    codes, grad_scale = to_float8(gradient * scale.t(), WEIGHT, by_row=True)
    return codes, grad_scale, weight, torch.ones(1, weight.shape[1], device=weight.device)


def to_float8(x: Tensor, dtype: torch.dtype, *, by_row: bool) -> tuple[Tensor, Tensor]:
    """[N, I] -> its codes in `dtype` and the float32 scale, one or [N, 1], such that codes x scale is about x."""
    largest = torch.finfo(dtype).max
    size = x.abs().amax(dim=1, keepdim=True) if by_row else x.abs().max()
    scale = size.float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, emulate: bool, *, fast: bool = False
) -> Tensor:
    """[N, I] times [I, O], both 8-bit, with scales one or [N, 1] and [1, O].

    `fast`: let the hardware add up in fewer bits, as is usual for forward products, but not for gradients.
    """
    if emulate:
        return ((a.float() * a_scale) @ (b.float() * b_scale)).to(dtype)
    if a.stride(1) != 1:  # the hardware takes the first factor by rows
        a = a.contiguous()
    if b.stride(0) != 1:  # and the second by columns
        b = b.t().contiguous().t()
    out = torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16, use_fast_accum=fast)
    return out.to(dtype)


def frozen_float8(model: nn.Module) -> dict[str, FrozenFloat8Linear]:
    """The modules of `model` that hold quantised weights, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FrozenFloat8Linear)}


@contextmanager
def plain_products(model: nn.Module) -> Iterator[None]:
    """While active, the converted linear layers of `model` take what flows through them as it is; only weights that
    are kept or gathered in 8 bits are rounded. transformer-engine's do so outside of `float8_autocast`."""
    frozen = list(frozen_float8(model).values())
    trained = [m for m in model.modules() if type(m).__name__ == "Float8Linear"]  # torchao's
    for module in frozen:
        module.plain = True
    for linear in trained:
        linear.forward = partial(_plain_product, linear)
    try:
        # what is compiled has the 8-bit products in it
        with torch.compiler.set_stance("force_eager") if frozen or trained else nullcontext():
            yield
    finally:
        for module in frozen:
            del module.plain
        for linear in trained:
            del linear.forward


def _plain_product(linear: nn.Module, x: Tensor) -> Tensor:
    weight: Any = linear.weight
    if hasattr(weight, "to_original_precision"):  # gathered in 8 bits
        weight = weight.to_original_precision()
    bias: Any = linear.bias
    return nn.functional.linear(x, weight, bias)


def plain_weight(tensor: Tensor) -> Tensor:
    """`tensor` without what torchao puts around a weight that is gathered in 8 bits; its memory is shared."""
    share = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    inner = getattr(share, "_tensor", None)
    if inner is None or type(share) is Tensor:
        return tensor
    return like(tensor, inner)
