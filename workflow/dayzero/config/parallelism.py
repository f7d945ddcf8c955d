"""`parallelism`: how the ranks share the work."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from dayzero.config.section import Section


class Parallelism(Section):
    """How the ranks share the work; the world size is the product of the sizes."""

    strategy: Literal["fsdp2", "ddp", "megatron_fsdp", "none"] = "fsdp2"
    """megatron_fsdp: NVIDIA's Megatron-FSDP (NVIDIA GPUs and the package megatron-fsdp), over dp_shard alone; not with
    lora, compile or tied weights. none: one bare process without wrappers, the reference that all others are compared
    with."""
    dp_replicate: PositiveInt = 1
    """Data-parallel replicas (all of them for ddp; HSDP when dp_shard > 1 too)."""
    dp_shard: PositiveInt = 1
    """Ranks that share one copy of weights, gradients and optimizer state (FSDP2)."""
    tp: PositiveInt = 1
    """Ranks that split each attention and MLP matrix (tensor parallelism); must divide the numbers of heads. 1: off."""
    sequence_parallel: bool = False
    """With tp > 1: each rank keeps only its share of the tokens between the split matrices."""
    cp: PositiveInt = 1
    """Ranks that split the tokens of each row (context parallelism), for long rows. 1: off."""
    cp_method: Literal["allgather", "ulysses", "ring"] = "allgather"
    """How attention reaches the other ranks' tokens: keys gathered, heads exchanged, or keys passed round."""
    pp: PositiveInt = 1
    """Ranks (of each data-parallel share) that split the layers between them (pipeline parallelism), at most as many as
    there are layers; global_batch_size / (local_batch_size x dp) micro-batches, at least `pp`, keep them busy. 1: off.
    """
    pp_schedule: Literal["1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """1f1b: one piece of the model a rank. interleaved, zero_bubble: two pieces a rank (pp x 2 at most the layers) and
    less waiting; interleaved passes round twice, zero_bubble there and back, with weight gradients filling the waits.
    """
    ep: PositiveInt = 1
    """Ranks that share out a mixture's experts and exchange tokens; borrowed from dp_shard x cp. 1: off."""

    @property
    def world_size(self) -> int:
        """Number of training processes."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp
