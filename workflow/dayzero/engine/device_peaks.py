"""How fast a device can multiply bfloat16 matrices at most: the denominator of model FLOPs utilisation (MFU).

MFU: the operations that a model's training needs (see `flops.py`) over those that the device could have done in the
same time (PaLM, Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B).
"""

from __future__ import annotations

import re

import torch

_NVIDIA = "https://www.nvidia.com/en-us/data-center"
BF16_TFLOPS: dict[str, tuple[float, str]] = {
    "GB200": (2500.0, f"{_NVIDIA}/gb200-nvl72/"),
    "B200": (2250.0, f"{_NVIDIA}/dgx-b200/"),
    "H200 NVL": (835.5, f"{_NVIDIA}/h200/"),
    "H200": (989.5, f"{_NVIDIA}/h200/"),
    "GH200": (990.0, f"{_NVIDIA}/grace-hopper-superchip/"),
    "H100 PCIe": (756.5, "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"),
    "H100 NVL": (835.5, f"{_NVIDIA}/h100/"),
    "H100": (989.5, f"{_NVIDIA}/h100/"),
    "A100": (312.0, f"{_NVIDIA}/a100/"),
    "A30": (165.0, f"{_NVIDIA}/products/a30-gpu/"),
    "A10": (125.0, f"{_NVIDIA}/products/a10-gpu/"),
    "L40S": (362.0, f"{_NVIDIA}/l40s/"),
    "L4": (121.0, f"{_NVIDIA}/l4/"),
    "MI300X": (1307.4, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"),
    "MI325X": (1307.4, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi325x.html"),
}
"""A word (or words) of the device's name, more special ones first -> dense bf16 TFLOP/s and the maker's page. Where a
page gives the rate with sparsity only, half of it stands here."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """bf16 operations a second of `device` at most; None where the table lacks it, on a CPU and for float32 training.

    FP8 training is measured against bf16 too, so that the figures of one device can be compared.
    """
    if device.type != "cuda" or precision == "fp32":
        return None
    return peak_of_name(torch.cuda.get_device_name(device))


def peak_of_name(name: str) -> float | None:
    """The same for a device's name, e.g. `NVIDIA H100 80GB HBM3`; None for a slice of one (MIG)."""
    if re.search(r"\bMIG\b", name):
        return None
    for words, (tflops, _) in BF16_TFLOPS.items():
        if re.search(rf"\b{words}\b", name):
            return tflops * 1e12
    return None
