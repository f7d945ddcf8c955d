"""What the process does that a person or a rule starts: it checks, holds the run's lock, and starts the ranks."""

from __future__ import annotations

import argparse
import os
import socket
from contextlib import nullcontext

import torch

from dayzero import attempts, slurm
from dayzero.checkpoint_files import checkpoints
from dayzero.config import RunConfig
from dayzero.console import log
from dayzero.engine import checkpoint
from dayzero.engine.launch import StoppedEarly, run_torchrun
from dayzero.engine.launch_nodes import NodeSettings, run_on_nodes
from dayzero.engine.node import use_interface
from dayzero.engine.signals import noted
from dayzero.errors import ConfigError
from dayzero.gpu_shares import own_gpus
from dayzero.interruption import stop_or_go_on, stopped_in_time
from dayzero.run_lock import RunLock
from dayzero.stages.training.checks import check_all
from dayzero.stages.training.inputs import identity, read_run

STAGE = "dayzero.stages.train"
"""The module that every rank runs."""


def launch(args: argparse.Namespace, arguments: list[str]) -> None:
    """Train in processes of their own, which are given the same `arguments`."""
    run = read_run(args)
    check_all(run, args)
    job = slurm.current_job()
    with RunLock(args.output, job=job) as lock:
        _set_aside_other_checkpoints(run, args)
        for path in (args.output / "metrics.jsonl", args.output / "summary.json"):
            path.unlink(missing_ok=True)
        with attempts.recorded(args.output, job, run.train.checkpoint.every, lock.last_sign):
            try:
                finished = _run_ranks(run.parallelism.world_size, args, arguments, job)
            except StoppedEarly:
                finished = False
    # written last: a request to stop that came in the last moment had nothing left to stop
    if not (finished or (args.output / "summary.json").exists()):
        stop_or_go_on(args.output, job, args.max_requeues, args.stop_before)


def _set_aside_other_checkpoints(run: RunConfig, args: argparse.Namespace) -> None:
    """Move checkpoints of another config away, where the command line allows it, and take back this one's.

    The record of their starts goes with them. Raises `ConfigError` where that is not allowed, `DataError` for a damaged
    checkpoint.
    """
    directory, own, reason = args.output / "checkpoints", identity(run, args), ""
    found = checkpoints(directory)
    if found:
        try:
            checkpoint.check_identity(found[-1], own)
            return
        except ConfigError as error:
            if not args.set_aside_other_checkpoints:
                raise
            reason = str(error)
    record, inside = args.output / attempts.FILE, directory / attempts.FILE
    if found and record.exists():
        os.replace(record, inside)
    if args.set_aside_other_checkpoints and checkpoint.take_back(directory, own):
        log.warning("taking back this config's checkpoints from %s", checkpoint.superseded(directory))
        record.unlink(missing_ok=True)
        if inside.exists():
            os.replace(inside, record)
    elif found:
        log.warning("training afresh; the old checkpoints are in %s: %s", checkpoint.set_aside(directory), reason)


def _require_gpus(processes: int) -> None:
    """Raise `ConfigError` where this machine has GPUs, and fewer than processes."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else processes
    if processes > gpus:
        raise ConfigError(
            f"parallelism: the sizes make {processes} processes on this machine, which has {gpus} GPUs: make them "
            "smaller, or use more nodes (resources.train.nodes, on SLURM)"
        )


def _stop_if_asked() -> None:
    """Raise `StoppedEarly` where a request to stop came: nothing else heeds it before the ranks are there."""
    if asked := noted():
        raise StoppedEarly(asked)


def _run_ranks(world_size: int, args: argparse.Namespace, arguments: list[str], job: slurm.Job | None) -> bool:
    """Start the ranks on the nodes of a SLURM job or on this machine; False when they stopped as asked."""
    if job is None or slurm.in_job_step():
        if args.nodes > 1 and job:
            raise ConfigError(
                f"resources.train.nodes is {args.nodes}, but this is a step of job {job.name}, which cannot start "
                "processes on its other nodes: set gpu_request in default-resources of the profile and small_runs to "
                "false (profiles/README.md), or nodes to 1"
            )
        if args.nodes > 1:
            log.info("not in a SLURM job: all %d processes run on this machine", world_size)
        if args.network_interface:
            use_interface(args.network_interface, socket.gethostname())
        _require_gpus(world_size)
        in_time = stopped_in_time(job, args.stop_before) if job else nullcontext()
        with in_time, own_gpus(world_size, waiting=_stop_if_asked):
            return run_torchrun(STAGE, arguments, world_size)
    settings = NodeSettings(nodes=args.nodes, network_interface=args.network_interface)
    logs = args.output.parent / "logs" / "ranks"
    return run_on_nodes(STAGE, arguments, world_size, job, settings, folder=args.output, logs=logs)
