"""What the process does that a person or a rule starts: it checks, holds the run's lock, and starts the ranks."""

from __future__ import annotations

import argparse

from dayzero import attempts, slurm
from dayzero.config import RunConfig
from dayzero.console import log
from dayzero.engine import checkpoint
from dayzero.engine.gpu_shares import own_gpus
from dayzero.engine.launch import run_torchrun
from dayzero.engine.launch_nodes import NodeSettings, run_on_nodes
from dayzero.errors import ConfigError
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
            finished = _run_ranks(run.parallelism.world_size, args, arguments, job)
    if not finished:
        stop_or_go_on(args.output, job, args.max_requeues, args.stop_before)


def _set_aside_other_checkpoints(run: RunConfig, args: argparse.Namespace) -> None:
    """Move checkpoints of another config away where the command line allows it. Raises `ConfigError` where not."""
    directory = args.output / "checkpoints"
    if found := checkpoint.checkpoints(directory):
        try:
            checkpoint.check_identity(found[-1], identity(run, args))
        except ConfigError as error:
            if not args.set_aside_other_checkpoints:
                raise
            log.warning("training afresh; the old checkpoints are in %s: %s", checkpoint.set_aside(directory), error)
            (args.output / attempts.FILE).unlink(missing_ok=True)


def _run_ranks(world_size: int, args: argparse.Namespace, arguments: list[str], job: slurm.Job | None) -> bool:
    """Start the ranks on the nodes of a SLURM job or on this machine; False when they stopped as asked."""
    if job is None or slurm.in_job_step():
        if args.nodes > 1:
            log.info("not in a SLURM job's batch script: all %d processes run on this machine", world_size)
        if job is None:
            return run_torchrun(STAGE, arguments, world_size)
        with stopped_in_time(job, args.stop_before), own_gpus(world_size, job.job_id):
            return run_torchrun(STAGE, arguments, world_size)
    settings = NodeSettings(nodes=args.nodes, network_interface=args.network_interface)
    logs = args.output.parent / "logs" / "ranks"
    return run_on_nodes(STAGE, arguments, world_size, job, settings, folder=args.output, logs=logs)
