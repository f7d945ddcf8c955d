"""Small runs that share an allocation: they train side by side, and one that fails takes no other's result away.

snakemake-executor-plugin-slurm starts a group as a Snakemake in the batch script that gives its jobs to srun one at a
time, in an allocation whose cores, memory and GPUs are those of all of them and whose time is that of the longest. So a
group of trainings becomes one step with the whole of the allocation, in which Snakemake itself starts them all; each
training then takes GPUs of its own. Snakemake knows a group as one job, which fails with any of its members.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dayzero.slurm import SHARED_BY
from dayzero.snakemake_resources import Run, Site
from dayzero.wiring import Wiring

IDENTITY = ("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_CLUSTER_NAME", "SLURM_SUBMIT_DIR", "SLURM_SUBMIT_HOST", "SLURM_CONF")
"""What a step keeps of the batch script's variables: srun would obey the others, which are the allocation's numbers."""
GROUP_FAILED = "Failed group"
"""Begins what the executor says of a failed group in Snakemake's log."""


def group_command(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]] | None:
    """Command and environment of the step that trains this group's runs side by side; None in any other process.

    `argv` is this process's command line, as the batch script wrote it.
    """
    if not {"slurm-jobstep", "--local-groupid", "--target-jobs"} <= {*argv}:
        return None
    jobs = _values(argv, "--target-jobs")
    if any(not job.startswith("train:") for job in jobs):  # other stages would share the GPUs of one
        return None
    kept = list(argv[1:])
    for option in ("--executor", "--jobs"):
        place = kept.index(option)
        del kept[place : place + 2]
    cpus, gpus = environment.get("SLURM_CPUS_PER_TASK"), environment.get("SLURM_GPUS")
    step = ["srun", "--nodes=1", "--ntasks=1", "--cpu-bind=q"]
    step += [f"--cpus-per-task={cpus}"] if cpus else []
    step += [f"--gpus={gpus}"] if gpus else []
    ours = {k: v for k, v in environment.items() if k in IDENTITY or not k.startswith(("SLURM_", "SRUN_", "SBATCH_"))}
    command = [*step, sys.executable, "-m", "snakemake", *kept, "--cores", cpus or "all", "--keep-going"]
    return command, {**ours, SHARED_BY: str(len(jobs))}


def become_group(argv: Sequence[str]) -> None:
    """Replace this process by the step of its group's trainings, where it is the batch script's Snakemake of one."""
    if found := group_command(argv, os.environ):
        command, environment = found
        os.execvpe(command[0], command, environment)  # noqa: S606 (a list: no shell)


def _values(argv: Sequence[str], option: str) -> list[str]:
    values: list[str] = []
    for text in argv[argv.index(option) + 1 :]:
        if text.startswith("--"):
            break
        values.append(text)
    return values


def group_problems(
    wiring: Wiring, site: Site, groups: Mapping[str, str], components: Mapping[str, int], on_a_node: int | None
) -> list[str]:
    """What speaks against the groups that are asked for: Snakemake would find it when the first of them is submitted.

    `on_a_node`: GPUs of the largest node of the trainings' partition. None: not known.
    """
    group = groups.get("train", "")
    together = components.get(group, 1)
    if together < 2:
        return []
    asked = f"groups train={group}"
    if not site.runs_are_small:
        return [f"{asked}: small_runs is not true: set it (default-resources of the profile), or leave groups out"]
    trained = [name for name in wiring.runs if wiring.trained(name)]
    problems = []
    for key, ask in _ALIKE.items():
        asking: dict[Any, str] = {}
        for name in trained:
            asking.setdefault(ask(wiring, site, name), name)
        if len(asking) > 1:
            (value, one), (instead, other) = list(asking.items())[:2]
            problems.append(
                f"{asked}: runs {one} and {other} differ in {key} ({value!r} and {instead!r}), and jobs of one "
                "allocation cannot: make them alike, or leave groups out"
            )
    gpus = sorted((wiring.gpus("train", Run(name)) for name in trained), reverse=True)
    if on_a_node is not None and on_a_node < (wanted := sum(gpus[:together])) and gpus[0] <= on_a_node:
        problems.append(
            f"group-components {group}={together}: that many trainings ask for {wanted} GPUs of one node, but the "
            f"nodes of the partition have {on_a_node}: set it to {on_a_node // gpus[0]}"
        )
    return problems


def _partition(wiring: Wiring, site: Site, name: str) -> str:
    return site.gpu_partition if wiring.gpus("train", Run(name)) else site.cpu_partition


def _of_train(key: str) -> Any:
    return lambda wiring, _, name: getattr(wiring.resources("train", Run(name)), key)


_ALIKE = {
    "their partition, by resources.train.gpu": _partition,
    "gpu_type, by resources.train.gpu": lambda wiring, site, name: (
        site.gpu_type * bool(wiring.gpus("train", Run(name)))
    ),
    **{
        f"resources.train.{key}": _of_train(key)
        for key in ("nodes", "stop_before", "max_requeues", "network_interface")
    },
}
"""What all jobs of a group must ask for alike, since it is text to Snakemake, and what each run asks."""


def mend_groups() -> None:
    """Let a group that fails keep what had finished, and say why it failed."""
    _keep_finished()
    _say_why()


def _keep_finished() -> None:
    """Let a group that fails keep the outputs of those of its jobs that had finished.

    They are what the jobs in the allocation left: one that failed there has removed its own, and what lay there before
    the group was submitted is known by its time of modification.
    """
    from snakemake.jobs import GroupJob
    from snakemake_executor_plugin_slurm import Executor

    before: dict[str, int | None] = {}
    submit, conclude = Executor.run_job, GroupJob.postprocess

    def run_job(executor: Any, job: Any) -> None:
        if job.is_group():
            for file in job.output:  # of a group's second try: as before its first
                before.setdefault(str(file), _stamp(file))
        submit(executor, job)

    def is_new(file: Any) -> bool:
        return (stamp := _stamp(file)) is not None and stamp != before[str(file)]

    async def postprocess(group: Any, error: bool = False, **options: Any) -> None:
        if not error:
            await conclude(group, **options)
            return
        for job in group.jobs:
            finished = all(is_new(file) for file in job.output)
            await job.postprocess(error=not finished, check_output_mtime=False, **options)

    Executor.run_job, GroupJob.postprocess = run_job, postprocess


def _say_why() -> None:
    """Log what the executor says of a group that fails, which Snakemake leaves out."""
    from snakemake.jobs import GroupJob
    from snakemake.logging import logger

    tell = GroupJob.log_error

    def log_error(group: Any, msg: str | None = None, **options: Any) -> None:
        tell(group, msg, **options)
        if msg:
            logger.error(f"{GROUP_FAILED} {group.groupid}: {msg}")

    GroupJob.log_error = log_error


def _stamp(file: Any) -> int | None:
    try:
        return Path(str(file)).stat().st_mtime_ns
    except FileNotFoundError:
        return None
