"""Job arrays: several runs' jobs under one SLURM id, each task with an id of its own.

snakemake-executor-plugin-slurm starts every task of an array as the Snakemake of the array's first job, with the
commands of the others as an argument. That process would start a task's own Snakemake and then judge the first job by
its end (remove the first job's outputs when the task fails), and with the resource `mpi` it would run the first job
again. So it becomes the task's own Snakemake instead, before it has read a rule.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from dayzero.errors import ConfigError
from dayzero.files import canonical_json
from dayzero.snakemake_resources import Run, Site
from dayzero.wiring import Wiring

OPTION = "--slurm-jobstep-array-execs"
BECOME = "DAYZERO_ARRAY_TASK"
"""Environment variable: the array task whose own Snakemake this process belongs to."""

LONGEST = 30
"""Most tasks of an array: their commands are one argument, of 2 to 4 KiB each, and Linux allows one of 128 KiB."""


def task_command(argv: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """The command of this array task's own job, for a shell; None in any other process.

    `argv` is this process's command line, as the array's batch script wrote it. Raises ConfigError where it is a task's
    but the commands are missing: the first job would be run in its place.
    """
    task, first = environment.get("SLURM_ARRAY_TASK_ID"), environment.get("SLURM_ARRAY_TASK_MIN")
    job_step = "slurm-jobstep" in argv
    if not job_step or task is None or task == first or environment.get(BECOME) == _name(environment):
        return None
    given = next((text.partition("=")[2] for text in argv if text.startswith(f"{OPTION}=")), None)
    if given is None:
        raise ConfigError(
            f"task {task} of the array was not told its job: lower --slurm-array-limit; if no array was asked for, "
            "start snakemake outside of an array's task, or unset SLURM_ARRAY_TASK_ID first"
        )
    from snakemake_executor_plugin_slurm_jobstep import parse_array_execs

    return zlib.decompress(bytes.fromhex(parse_array_execs(given)[task])).decode()


def become_task(argv: Sequence[str]) -> None:
    """Replace this process by the array task's own Snakemake, where it is another's. Raises ConfigError."""
    if command := task_command(argv, os.environ):
        os.environ[BECOME] = _name(os.environ)
        os.execvp("sh", ["sh", "-c", command])  # noqa: S606 (a shell command that Snakemake has quoted)


def _name(environment: Mapping[str, str]) -> str:
    return f"{environment.get('SLURM_ARRAY_JOB_ID')}_{environment['SLURM_ARRAY_TASK_ID']}"


def array_problems(wiring: Wiring, site: Site, settings: Any, at_once: int | None = None) -> list[str]:
    """What speaks against the arrays that are asked for; `settings` are the executor's.

    The plugin makes an array of the jobs that Snakemake hands it together, and forgets, for ever, those that come
    before the others are ready. So all trainings must be ready at once: `at_once` is how many are handed over together
    (None: any number), and other rules' jobs, each of which waits for its own run, make no arrays.
    """
    asked = getattr(settings, "array_jobs", None)
    if not asked:
        return []
    problems = [
        f"slurm-array-jobs {rule}: the jobs of {rule} are ready one by one, and an array waits for all: only train can"
        for rule in (name.strip() for name in str(asked).replace(";", ",").split(","))
        if rule != "train"
    ]
    if site.runs_are_small:
        problems.append("slurm-array-jobs train: leave it out, or set small_runs to false: an array has no groups")
    trained = [name for name in wiring.runs if wiring.trained(name)]
    if at_once is not None and len(trained) > at_once:
        problems.append(
            f"slurm-array-jobs train: {len(trained)} trainings, of which Snakemake hands over {at_once} at a time, and "
            f"the others would be lost: set jobs to {len(trained)} or more and max-jobs-per-timespan to "
            f"{len(trained)}/1s"
        )
    for ask, what, remedy in (
        (_waits_for, "wait for different data, tokens or models, so that not all are ready at once", "make them alike"),
        (
            _asks_for,
            "ask for different resources.train, GPUs or nodes, and all get what the first asks",
            "make them alike",
        ),
    ):
        asking: dict[str, str] = {}
        for name in trained:
            asking.setdefault(ask(wiring, name), name)
        if len(asking) > 1:
            one, other = list(asking.values())[:2]
            problems.append(f"slurm-array-jobs train: runs {one} and {other} {what}: {remedy}, or leave train out")
    limit = int(getattr(settings, "array_limit", 0))
    if getattr(settings, "pass_command_as_script", False):
        problems.append("slurm-pass-command-as-script: an array's tasks are not told their jobs that way: leave it out")
    if not problems and limit > LONGEST:
        problems.append(
            f"slurm-array-limit {limit}: the command line of a longer array does not fit, at most {LONGEST} jobs do: "
            f"add --slurm-array-limit {LONGEST} (more runs make several arrays)"
        )
    return problems


def _asks_for(wiring: Wiring, name: str) -> str:
    run = Run(name)
    asked = wiring.resources("train", run).model_dump(mode="json")
    return canonical_json([asked, wiring.gpus("train", run), wiring.processes(run)])


def _waits_for(wiring: Wiring, name: str) -> str:
    return canonical_json([wiring.tokens_manifest(name), wiring.start(name), wiring.teacher(name)])
