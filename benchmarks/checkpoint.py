"""How long training stands still for a checkpoint: written at once, and in the background.

    python benchmarks/checkpoint.py [--ranks 2] [--width 512] [--layers 8] [--rounds 5] [--folder DIRECTORY]

One model of random weights with FSDP2 on `--ranks` processes; a checkpoint holds its weights and AdamW moments. In
every round, in turn: steps alone, a checkpoint written at once, one in the background with a step meanwhile. Medians
over the rounds; a time is the slowest rank's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from dayzero.checkpoint_files import checkpoints
from dayzero.config import Checkpoint, Method, Train
from dayzero.engine import checkpoint, distributed
from dayzero.engine.checkpoint_writer import CheckpointWriter
from dayzero.engine.launch import is_worker, run_torchrun
from dayzero.engine.model import ModelSource
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.trainer import Trainer
from torch import Tensor

VOCAB_SIZE = 8192


@dataclass
class RandomBatch:
    step: int
    micro_batches: list[dict[str, Tensor]]
    num_label_tokens: int
    num_tokens: int
    epoch: float = 0.0
    row_ids: tuple[int, ...] = ()


def random_batch(step: int, rows: int, tokens: int) -> RandomBatch:
    ids = torch.randint(0, VOCAB_SIZE, (rows, tokens + 1))
    positions = torch.arange(tokens).expand(rows, tokens)
    micro = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "position_ids": positions}
    micro["lengths"] = torch.full((rows,), tokens)
    return RandomBatch(step, [micro], rows * tokens, rows * tokens)


def slowest(do: Callable[[], object], device: torch.device) -> float:
    """Seconds that `do` takes on the slowest rank; all start together."""
    distributed.barrier()
    started = time.perf_counter()
    do()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = torch.tensor(time.perf_counter() - started, device=device)
    torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX)
    return seconds.item()


def measure(args: argparse.Namespace, device: torch.device) -> None:
    folder = Path(args.folder)
    architecture = {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": args.width,
        "intermediate_size": 4 * args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.width // 64,
    }
    ranks = distributed.world_size()
    model = ParallelModel(
        source=ModelSource(directory=None, architecture=architecture, random_weights=True),
        method=Method(name="pretrain"),
        train=Train(max_steps=10**6, precision="bf16" if device.type == "cuda" else "fp32"),
        dims=ParallelDims(strategy="fsdp2", world_size=ranks, dp_shard=ranks),
        seed=0,
        device=device,
    )
    trainer = Trainer(model=model, directory=folder, identity={}, max_steps=10**6)
    step = 0

    def train() -> None:
        nonlocal step
        trainer.train_step(random_batch(step, args.rows, args.tokens))
        step += 1

    def save(writer: CheckpointWriter) -> None:
        state = checkpoint.state_of(trainer.module, trainer.optimizer, for_saving=True)
        writer.save(step, state, {"validation_losses": {}})

    at_once = CheckpointWriter(folder, Checkpoint(keep_last=1, asynchronous=False))
    background = CheckpointWriter(folder, Checkpoint(keep_last=1))
    times: dict[str, list[float]] = {}
    for number in range(args.rounds + 1):  # the first is for warming up: caches, optimizer state, buffers
        found: dict[str, list[float]] = {
            "a training step": [slowest(train, device) for _ in range(2)],
            "stall, written at once": [slowest(lambda: save(at_once), device)],
        }
        train()
        found["stall, in the background"] = [slowest(lambda: save(background), device)]
        started = time.perf_counter()
        found["a step while it is written"] = [slowest(train, device)]
        background.wait()
        found["until it is complete"] = [time.perf_counter() - started]
        for name, seconds in found.items() if number else ():
            times.setdefault(name, []).extend(seconds)
    size = sum(f.stat().st_size for path in checkpoints(folder) for f in path.iterdir())
    if distributed.rank() == 0:
        print(
            f"\n{model.total_parameters / 1e6:.0f} M parameters, checkpoints of {size / 2**20:.0f} MiB, {ranks} ranks"
        )
        print(f"\n| {'':28}| seconds | in steps | lowest | highest |\n|{'-' * 29}|---:|---:|---:|---:|")
        base = median(times["a training step"])
        for name, seconds in times.items():
            row = f"{median(seconds):7.3f} | {median(seconds) / base:8.2f} | {min(seconds):6.3f} | {max(seconds):7.3f}"
            print(f"| {name:28}| {row} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4, help="rows of a step on each rank")
    parser.add_argument("--tokens", type=int, default=128, help="tokens in a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the checkpoints go (default: a temporary folder, removed)")
    args = parser.parse_args()
    if is_worker():
        with distributed.process_group() as device:
            measure(args, device)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        run_torchrun("benchmarks.checkpoint", [*sys.argv[1:], "--folder", folder], args.ranks)


if __name__ == "__main__":
    main()
