"""Base weights in 4 bits under LoRA (QLoRA, https://arxiv.org/abs/2305.14314): NF4 in blocks of 64, adapters on top.

The weights of all frozen linear modules inside the decoder's layers are quantised once, when they are loaded, and made
whole again, in the dtype that is computed in, each time they are used. Which 4 bits a number becomes is decided here,
by the same operations on any device, so that the export can make the very weights that were trained on; on a GPU
bitsandbytes' kernel turns them back. They are buffers: whole on each rank, while FSDP2 shards what is left.

Shapes: O outputs, I inputs, N = O * I.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from dayzero.engine.requirements import require_gpu_and_package
from dayzero.engine.structure import find_layers

BLOCK = 64
"""Numbers that share one scale, the largest absolute value among them."""

# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""The values of 4-bit NormalFloat: quantiles of a normal distribution (the paper's appendix E)."""


@lru_cache
def _table(device: torch.device) -> Tensor:
    """`NF4` on a device, to which a list is copied in a way that waits for all it does."""
    return torch.tensor(NF4, device=device)


def require_qlora() -> None:
    """Raise `ConfigError` where this machine cannot train on quantised weights."""
    require_gpu_and_package("method.name qlora", "bitsandbytes", "use lora")


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 of N numbers -> (two 4-bit indices in each byte, uint8 [N / 2, 1]; a scale a block, float32 [N / 64]).

    The layout is bitsandbytes': the first of two numbers in the high half of a byte, the last block perhaps short.
    """
    flat = weight.detach().to(torch.float32).flatten()
    missing = -len(flat) % BLOCK
    blocks = F.pad(flat, (0, missing)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)  # [N / 64]
    values = _table(weight.device)
    between = (values[1:] + values[:-1]) / 2
    safe = torch.where(scales > 0, scales, 1.0).unsqueeze(1)
    indices = torch.bucketize(blocks / safe, between).to(torch.uint8).flatten()[: len(flat) + len(flat) % 2]
    return (indices[0::2] << 4 | indices[1::2]).unsqueeze(1), scales


def dequantize_nf4(packed: Tensor, scales: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What `quantize_nf4` made -> the numbers [O, I] in `dtype`."""
    if packed.is_cuda:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(
            scales, shape=shape, code=_table(packed.device), blocksize=BLOCK, quant_type="nf4", dtype=dtype
        )
        return dequantize_4bit(packed, quant_state=state)
    indices = torch.stack([packed[:, 0] >> 4, packed[:, 0] & 15], dim=1).flatten().long()
    values = _table(packed.device)[indices[: shape.numel()]]
    return (values * scales.repeat_interleave(BLOCK)[: len(values)]).to(dtype).view(shape)


def rounded_nf4(weight: Tensor) -> Tensor:
    """[O, I] -> the nearest weight that NF4 can hold, float32."""
    return dequantize_nf4(*quantize_nf4(weight), weight.shape, torch.float32)


class Nf4Linear(nn.Module):
    """A frozen nn.Linear whose weight is in 4 bits."""

    packed: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        number, device = linear.weight.numel(), linear.weight.device
        # not in state dicts: they come from the base model, as all frozen weights
        packed = torch.empty(-(-number // 2), 1, dtype=torch.uint8, device=device)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", torch.empty(-(-number // BLOCK), device=device), persistent=False)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Take in the weight [O, I]."""
        assert weight.shape == (self.out_features, self.in_features), weight.shape
        for own, made in zip((self.packed, self.scales), quantize_nf4(weight.to(self.packed.device)), strict=True):
            own.copy_(made)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] as it is used."""
        shape = torch.Size((self.out_features, self.in_features))
        return dequantize_nf4(self.packed, self.scales, shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        result = cast(Tensor, _Multiply.apply(x, self))
        return result if self.bias is None else result + self.bias.to(result.dtype)


class _Multiply(Function):
    """x W^T, with the gradient of x alone; W is made again for it, so that no whole weight is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Nf4Linear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.weight_in(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.linear.weight_in(gradient.dtype), None


def quantized_modules(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear modules with frozen weights inside the decoder's layers, by name; adapters and the head are none."""
    inside = {id(module) for module in find_layers(model).modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and id(module) in inside
        and not module.weight.requires_grad
        and "lora_" not in name
    }


def quantize_modules(model: PreTrainedModel) -> None:
    """Put `Nf4Linear` in the place of `quantized_modules`, in place; once `model` has its adapters."""
    for name, linear in quantized_modules(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Nf4Linear(linear))
