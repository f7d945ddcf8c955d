"""The only arithmetic on parallel sizes. Pure: it needs no process group and says no before one exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dayzero.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

STRATEGIES = ("fsdp2", "ddp", "none")


class SizeError(ConfigError):
    """Sizes that contradict each other; `key` is the config key to change."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


@dataclass(frozen=True, kw_only=True)
class ParallelDims:
    """Sizes of the mesh axes. Their product is the world size; each error prints the equation with its values.

    Raises `SizeError` when the sizes contradict each other or the world.
    """

    strategy: str
    world_size: int
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    cp_method: str = "allgather"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise SizeError("parallelism.strategy", f"{self.strategy!r} is unknown: use one of {', '.join(STRATEGIES)}")
        product = self.dp * self.cp * self.tp
        sizes = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "cp": self.cp, "tp": self.tp}
        equation = " x ".join(f"{name} {size}" for name, size in sizes.items()) + f" = {product}"
        if product != self.world_size:
            raise SizeError(
                "parallelism",
                f"{equation}, but the world size is {self.world_size}: start {product} processes, or change the sizes "
                f"so that their product is {self.world_size}",
            )
        if self.strategy == "none" and self.world_size != 1:
            raise SizeError("parallelism.strategy", f"none is one process, but {equation}: use fsdp2, or sizes of 1")
        if self.strategy == "ddp" and self.dp_shard != 1:
            raise SizeError(
                "parallelism.dp_shard",
                f"ddp keeps whole copies, but {equation}: use dp_replicate {self.dp} and dp_shard 1, or strategy fsdp2",
            )
        if self.strategy == "ddp" and self.tp * self.cp != 1:
            raise SizeError("parallelism.strategy", f"ddp splits only rows, but {equation}: use fsdp2 with tp and cp")
        if self.sequence_parallel and self.tp == 1:
            raise SizeError("parallelism.sequence_parallel", "is on, but tp is 1: set tp, or turn it off")

    @property
    def dp(self) -> int:
        """Ranks that see different rows."""
        return self.dp_replicate * self.dp_shard

    def dp_rank(self, rank: int) -> int:
        """Which share of the rows `rank` sees; the ranks of a cp and tp group, which are neighbours, see the same."""
        return rank // (self.cp * self.tp)

    @property
    def token_multiple(self) -> int:
        """A row's length must be a multiple of this: cp splits it in 2 cp pieces, sequence parallelism each of them."""
        return (2 * self.cp if self.cp > 1 else 1) * (self.tp if self.sequence_parallel else 1)

    def grad_accum_steps(self, global_batch_size: int, local_batch_size: int) -> int:
        """Micro-batches of one rank in an optimizer step. Raises `SizeError` when they do not divide."""
        rows = local_batch_size * self.dp
        if left := global_batch_size % rows:
            below = global_batch_size - left
            near = f"{below} or {below + rows}" if below else str(rows)
            raise SizeError(
                "train.global_batch_size",
                f"global_batch_size {global_batch_size} % (local_batch_size {local_batch_size} * dp {self.dp}) = "
                f"{left}, must be 0: use {near}, or another local_batch_size",
            )
        return global_batch_size // rows

    def build_mesh(self, device_type: str) -> DeviceMesh:
        """The mesh of the weights, with axes (dp_replicate, dp_shard, tp); some strategies leave some out.

        Ranks that split a row hold the same weights, so cp counts into dp_shard here. tp is innermost: it talks most,
        so its ranks are neighbours on one node.
        """
        from torch.distributed.device_mesh import init_device_mesh

        axes = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard * self.cp, "tp": self.tp}
        if self.strategy == "ddp":
            del axes["dp_shard"]
        elif self.dp_replicate == 1:
            del axes["dp_replicate"]  # a replicate axis, even of size 1, costs an all-reduce for each gradient
        if self.tp == 1:
            del axes["tp"]
        return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    def build_cp_mesh(self, device_type: str) -> DeviceMesh:
        """The one-dimensional mesh of the ranks that split this rank's rows."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(device_type, (self.dp, self.cp, self.tp), mesh_dim_names=("dp", "cp", "tp"))["cp"]

    def data_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """The axes of `mesh` over which parameters are sharded or copied."""
        names = tuple(name for name in mesh.mesh_dim_names or () if name.startswith("dp"))
        return mesh[names]
