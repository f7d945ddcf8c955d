"""Which AdamW for sharded weights: seconds a step, and whether memory grows, of torch's three implementations.

    torchrun --standalone --nproc-per-node=1 benchmarks/optimizer.py

Weights of the shapes of a Llama-like model, as DTensors over all ranks, on the GPUs where there are any. The three take
turns, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import psutil
import torch
from dayzero.engine import distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

KINDS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    with distributed.process_group() as device:
        table(args.layers, args.width, args.steps, device)


def table(layers: int, width: int, steps: int, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (distributed.world_size(),))

    def weights() -> list[nn.Parameter]:
        w, mlp = width, 8 * width // 3
        shapes = [(w, w), (w // 4, w), (w // 4, w), (w, w), (mlp, w), (mlp, w), (w, mlp), (w,), (w,)] * layers
        made = [torch.randn(shape, device=device) for shape in shapes]
        return [nn.Parameter(distribute_tensor(m, mesh, [Shard(0)], src_data_rank=None)) for m in made]

    used = {kind: weights() for kind in KINDS}
    optimizers = {kind: torch.optim.AdamW(used[kind], **KINDS[kind]) for kind in KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    grown = dict.fromkeys(KINDS, 0)
    for step in range(steps):
        for kind, optimizer in optimizers.items():
            for p in used[kind]:
                p.grad = torch.ones_like(p)  # new gradients at every step, as in training
            before, started = memory(device), time.perf_counter()
            optimizer.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken = time.perf_counter() - started
            if step >= 5:  # moments and buffers exist by then
                seconds[kind].append(taken)
                grown[kind] += memory(device) - before
            optimizer.zero_grad()
    if distributed.rank() == 0:
        count = sum(p.numel() for p in used["fused"])
        ranks, tensors = distributed.world_size(), len(used["fused"])
        print(f"torch {torch.__version__}, {device.type}, ranks: {ranks}, weights: {count} in {tensors} tensors")
        print(f"{'implementation':<16}{'ms a step':>10}{'MB grown in ' + str(steps - 5) + ' steps':>24}")
        for kind in KINDS:
            print(f"{kind:<16}{1000 * median(seconds[kind]):>10.1f}{grown[kind] / 1e6:>24.1f}")


def memory(device: torch.device) -> int:
    """Bytes in use."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss


if __name__ == "__main__":
    main()
