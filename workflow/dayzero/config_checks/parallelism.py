"""How many ranks, where, and what the strategies do not go with."""

from __future__ import annotations

from collections.abc import Iterator

from dayzero.config import RunConfig
from dayzero.engine.parallel_dims import ParallelDims, SizeError


def check_sizes(run: RunConfig) -> Iterator[tuple[str, str]]:
    """The arithmetic of ranks and batches, as the engine does it."""
    try:
        dims = ParallelDims(world_size=run.parallelism.world_size, **run.parallelism.model_dump())
        dims.grad_accum_steps(run.train.global_batch_size, run.train.local_batch_size)
    except SizeError as error:
        yield error.key, error.reason


def check_nodes(run: RunConfig) -> Iterator[tuple[str, str]]:
    asked, world_size = run.resources.train, run.parallelism.world_size
    if left := world_size % asked.nodes:
        yield (
            "resources.train.nodes",
            f"the sizes of parallelism make {world_size} processes, and {world_size} % nodes {asked.nodes} = {left}, "
            "must be 0: every node has the same number of processes",
        )
        return
    processes = world_size // asked.nodes
    if isinstance(asked.gpu, int) and 0 < asked.gpu < processes:
        yield (
            "resources.train.gpu",
            f"{world_size} processes / nodes {asked.nodes} = {processes} on each node, but gpu is {asked.gpu}: set it "
            f"to {processes} or auto, or use more nodes",
        )
    if asked.stop_before >= asked.runtime * 60:
        yield (
            "resources.train.stop_before",
            f"{asked.stop_before} s before the end of a job of {asked.runtime} minutes ({asked.runtime * 60} s) is "
            "before it begins: raise resources.train.runtime",
        )


def check_megatron_fsdp(run: RunConfig) -> Iterator[tuple[str, str]]:
    if run.parallelism.strategy != "megatron_fsdp":
        return
    if run.train.optimizer.name != "adamw" or run.train.optimizer.state_dtype != "float32":
        yield (
            "train.optimizer.name",
            "with parallelism.strategy megatron_fsdp only adamw with float32 moments is tried: use it, or fsdp2",
        )
    if run.train.compile:
        yield "train.compile", "is not tried with parallelism.strategy megatron_fsdp: turn it off, or use fsdp2"
    if run.method.adapters or run.method.freeze:
        what = f"method.name {run.method.name}" if run.method.adapters else "method.freeze"
        yield (
            "parallelism.strategy",
            f"{what} freezes weights, which Megatron-FSDP frees while they are still needed: use fsdp2",
        )
