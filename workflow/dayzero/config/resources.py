"""`resources`: what each stage asks of the machine."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from dayzero.config.section import Section


class _AnyResources(Section):
    threads: PositiveInt = 2
    mem_mb: PositiveInt = 4000
    """Memory in MB."""
    runtime: PositiveInt = 60
    """Time limit in minutes."""


class StageResources(_AnyResources):
    """What one stage asks of the machine. Changing it reruns nothing."""

    gpu: Literal[0, 1] = 0
    """GPUs. Training alone uses more than one."""


class TrainResources(_AnyResources):
    """What training asks of the machine: of each node, where it has several. Changing it reruns nothing."""

    mem_mb: PositiveInt = 6000
    """Memory in MB."""
    runtime: PositiveInt = 240
    """Time limit in minutes."""
    gpu: NonNegativeInt | Literal["auto"] = 0
    """GPUs of each node. auto: one for each process."""
    nodes: PositiveInt = 1
    """Nodes of a SLURM job; must divide the number of processes, which the sizes of `parallelism` make. Without SLURM
    all processes run on this machine."""
    stop_before: NonNegativeInt = 120
    """Seconds before the time limit at which SLURM asks training to write a checkpoint; the job is then put back into
    the queue and goes on from there. 0: never asked."""
    max_requeues: NonNegativeInt = 100
    """How often a job is put back into the queue before training gives up. 0: never put back."""
    network_interface: str | None = None
    """Network interface of every node, or of this machine without SLURM, for NCCL and gloo (NCCL_SOCKET_IFNAME,
    GLOO_SOCKET_IFNAME). null: they choose."""


class Resources(Section):
    """Machine settings by stage; they are not part of a run's identity."""

    fetch: StageResources = StageResources(threads=1, mem_mb=4000, runtime=120)
    check_data: StageResources = StageResources(threads=1)
    tokenize: StageResources = StageResources()
    train: TrainResources = TrainResources()
    export: StageResources = StageResources(mem_mb=6000)
    evaluate: StageResources = StageResources(mem_mb=6000, runtime=240)
    verify_serving: StageResources = StageResources(mem_mb=6000)
    report: StageResources = StageResources(threads=1, mem_mb=2000)
