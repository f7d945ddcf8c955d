"""The process group and the few collectives the loop itself needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_MINUTES = 30.0
"""How long one rank waits for another in a collective."""
KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
"""Compiled kernels that oneDNN, and torch's layer over it, keep on a CPU: one for each shape of a product, more than
a step over rows of one length has. Both keep 1,024 by default; where each row has a length of its own these are hardly
met again, and took 0.7 GiB after eight steps of SmolLM2-135M."""


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join torchrun's process group (nccl beside gloo where there are GPUs, gloo elsewhere); yield this rank's device.

    Raises `RuntimeError` when not started by torchrun.
    """
    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError("no LOCAL_RANK in the environment: start this with torchrun")
    device = local_device()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:  # they are read when the first product is computed
        os.environ |= {name: value for name, value in KERNELS_KEPT.items() if name not in os.environ}
    dist.init_process_group(backend, timeout=timedelta(minutes=TIMEOUT_MINUTES))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def local_device() -> torch.device:
    """This rank's GPU where the machine has any, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """Sum each value over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor.tolist()


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
