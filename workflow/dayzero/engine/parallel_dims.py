"""The only arithmetic on parallel sizes. Pure: it needs no process group and says no before one exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dayzero.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

STRATEGIES = ("fsdp2", "ddp", "megatron_fsdp", "none")
SCHEDULES = ("1f1b", "interleaved", "zero_bubble")


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
    pp: int = 1
    pp_schedule: str = "1f1b"
    ep: int = 1
    """Borrows its ranks from dp_shard x cp, so it is no factor of the world size."""

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise SizeError("parallelism.strategy", f"{self.strategy!r} is unknown: use one of {', '.join(STRATEGIES)}")
        product = self.pp * self.dp * self.cp * self.tp
        sizes = {"pp": self.pp} if self.pp > 1 else {}
        sizes |= {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "cp": self.cp, "tp": self.tp}
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
        if self.strategy == "megatron_fsdp" and product != self.dp_shard:
            raise SizeError("parallelism.strategy", f"megatron_fsdp has dp_shard alone, but {equation}: use fsdp2")
        if self.sequence_parallel and self.tp == 1:
            raise SizeError("parallelism.sequence_parallel", "is on, but tp is 1: set tp, or turn it off")
        self._check_pp(equation)
        self._check_ep()

    def _check_pp(self, equation: str) -> None:
        if self.pp_schedule not in SCHEDULES:
            raise SizeError("parallelism.pp_schedule", f"{self.pp_schedule!r} is unknown: use {', '.join(SCHEDULES)}")
        if self.pp == 1:
            if self.pp_schedule != "1f1b":
                raise SizeError("parallelism.pp_schedule", f"is {self.pp_schedule}, but pp is 1: set pp, or leave it")
            return
        if self.strategy != "fsdp2":
            raise SizeError("parallelism.strategy", f"{self.strategy} keeps whole models, but {equation}: use fsdp2")
        if self.sequence_parallel:
            raise SizeError("parallelism.sequence_parallel", f"does not go with pp {self.pp}: turn it off, or set pp 1")

    def _check_ep(self) -> None:
        if self.ep == 1:
            return
        if self.strategy != "fsdp2":
            raise SizeError("parallelism.ep", f"{self.ep} needs strategy fsdp2, not {self.strategy}")
        shards = self.dp_shard * self.cp
        if shards % self.ep:
            cp = f" x cp {self.cp} = {shards}" if self.cp > 1 else ""
            raise SizeError(
                "parallelism.ep",
                f"takes its ranks from dp_shard {self.dp_shard}{cp}, but {shards} / ep {self.ep} = "
                f"{shards / self.ep:.4g}: "
                + (f"use a divisor of {shards}" if shards > 1 else f"set dp_shard to a multiple of {self.ep}"),
            )
        if self.pp > 1:
            raise SizeError("parallelism.ep", f"{self.ep} does not go with pp {self.pp}: set one of them to 1")
        if self.tp > 1 and not self.sequence_parallel:
            raise SizeError(
                "parallelism.ep",
                f"{self.ep} with tp {self.tp}: every tp rank would send all tokens to the experts, tp times too many: "
                "set sequence_parallel true, or tp 1",
            )

    @property
    def dp(self) -> int:
        """Ranks that see different rows."""
        return self.dp_replicate * self.dp_shard

    @property
    def unsharded(self) -> bool:
        """Whether each rank holds all weights, and FSDP2 has nothing to gather."""
        return self.strategy == "fsdp2" and self.dp_shard * self.cp == self.tp == self.pp == 1

    def dp_rank(self, rank: int) -> int:
        """Which share of the rows `rank` sees; the ranks of a cp and tp group, which are neighbours, see the same, and
        so do those of a pp group."""
        return rank // (self.cp * self.tp) % self.dp

    def seed_rank(self, rank: int) -> int:
        """Ranks with the same number draw the same dropout: those of tp, which hold parts of the same activations."""
        return rank // self.tp

    def pp_rank(self, rank: int) -> int:
        """Which stages `rank` holds; pp is the outermost axis."""
        return rank // (self.dp * self.cp * self.tp)

    @property
    def num_stages(self) -> int:
        """Pieces the model is cut into: one a rank, or two in the schedules that go through the ranks twice."""
        return self.pp * (1 if self.pp_schedule == "1f1b" else 2)

    def stages_of(self, pp_rank: int) -> list[int]:
        """The stages of a pp rank in the order of the model; zero_bubble goes through the ranks there and back."""
        if self.pp_schedule == "zero_bubble":
            return [pp_rank, 2 * self.pp - 1 - pp_rank]
        return list(range(pp_rank, self.num_stages, self.pp))

    def stage_owner(self, stage: int) -> int:
        """The pp rank that holds `stage`."""
        return next(rank for rank in range(self.pp) if stage in self.stages_of(rank))

    def check_layers(self, num_layers: int) -> None:
        """Raise `SizeError` where the model has fewer layers than stages."""
        if self.num_stages > num_layers:
            twice = "" if self.num_stages == self.pp else f" x 2 of {self.pp_schedule} = {self.num_stages} stages"
            most = num_layers // (self.num_stages // self.pp)
            raise SizeError("parallelism.pp", f"pp {self.pp}{twice} > {num_layers} layers: use at most pp {most}")

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
        steps = global_batch_size // rows
        self._check_micro_batches(steps, f"{global_batch_size} / (local_batch_size {local_batch_size} * dp {self.dp})")
        return steps

    def _check_micro_batches(self, steps: int, quotient: str) -> None:
        if self.pp == 1:
            return
        given = f"global_batch_size {quotient} = {steps} micro-batches"
        if steps < self.pp:
            raise SizeError("train.local_batch_size", f"{given} < pp {self.pp}: lower it, or raise global_batch_size")
        rounds = steps // self.pp
        if self.pp_schedule == "interleaved" and steps % rounds:
            raise SizeError(
                "train.global_batch_size",
                f"{given}, and {steps} % ({steps} // pp {self.pp}) = {steps % rounds}, must be 0 for pp_schedule "
                f"interleaved: have {rounds * self.pp} or {(rounds + 1) * self.pp} of them, or use another schedule",
            )

    def build_mesh(self, device_type: str) -> DeviceMesh:
        """The mesh of the weights, with axes (pp, dp_replicate, dp_shard, tp); some strategies leave some out.

        Ranks that split a row hold the same weights, so cp counts into dp_shard here. tp is innermost: it talks most,
        so its ranks are neighbours on one node; pp, which talks least, is outermost.
        """
        from torch.distributed.device_mesh import init_device_mesh

        axes = {"pp": self.pp, "dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard * self.cp, "tp": self.tp}
        if self.strategy == "ddp":
            del axes["dp_shard"]
        elif self.dp_replicate == 1:
            del axes["dp_replicate"]  # a replicate axis, even of size 1, costs an all-reduce for each gradient
        for name in ("pp", "tp"):
            if axes[name] == 1:
                del axes[name]
        return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    def build_expert_mesh(self, device_type: str) -> DeviceMesh:
        """The mesh of the experts' weights, over the same ranks: axes (dp_replicate, efsdp, ep, tp), some left out.

        Where `build_mesh` has dp_shard, here are efsdp x ep: each ep rank holds other experts, and FSDP2 shards those
        over efsdp. The ranks of an ep group are neighbours, since they exchange tokens in every layer.
        """
        from torch.distributed.device_mesh import init_device_mesh

        axes = {"dp_replicate": self.dp_replicate, "efsdp": self.dp_shard * self.cp // self.ep, "ep": self.ep}
        axes["tp"] = self.tp
        for name in ("dp_replicate", "tp"):
            if axes[name] == 1:
                del axes[name]
        return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))

    def build_cp_mesh(self, device_type: str) -> DeviceMesh:
        """The one-dimensional mesh of the ranks that split this rank's rows."""
        from torch.distributed.device_mesh import init_device_mesh

        sizes = (self.pp * self.dp, self.cp, self.tp)
        return init_device_mesh(device_type, sizes, mesh_dim_names=("dp", "cp", "tp"))["cp"]

    def data_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """The axes of `mesh` over which parameters are sharded or copied."""
        names = tuple(name for name in mesh.mesh_dim_names or () if name in ("dp_replicate", "dp_shard", "efsdp"))
        return mesh[names]
