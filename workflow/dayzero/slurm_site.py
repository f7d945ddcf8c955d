"""What a site cannot give is said before anything is submitted, in one line each."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dayzero.config_errors import nearest
from dayzero.console import log
from dayzero.errors import ConfigError
from dayzero.slurm import SECONDS, parse_time
from dayzero.slurm_arrays import array_problems
from dayzero.slurm_plugin import get_min_job_age, mend_sacct
from dayzero.snakemake_resources import Run, Site
from dayzero.wiring import Wiring

REMEMBERED = 300
"""Seconds for which squeue must know an ended job, where there is no sacct."""
PROFILE = "default-resources of profiles/slurm/config.yaml"


@dataclass(frozen=True)
class Partition:
    """What `sinfo` says of a partition."""

    gpus: int
    """GPUs of its largest node."""
    limit: float | None
    """Time limit in seconds; None: none."""
    nodes: int


Overwritten = Mapping[str, Mapping[str, Any]]
"""By rule, the resources that a profile's `set-resources` replaces."""


def check_site(
    wiring: Wiring,
    site: Site,
    account: str,
    executor_settings: Any,
    overwritten: Overwritten | None = None,
    at_once: int | None = None,
    jobs: int | None = None,
) -> None:
    """Hold the profile and the runs against the cluster. Raises ConfigError with a line for each mistake.

    Where the cluster keeps no accounts (no sacct), job states are asked of squeue instead.

    Args:
        at_once: jobs that Snakemake hands over together at most. None: any number.
        jobs: how many Snakemake keeps in the queue at most.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on PATH: start on a login node of a SLURM cluster (its SLURM module loaded), or leave out "
            "--profile slurm"
        )
    there = partitions()
    problems = []
    for key in ("cpu_partition", "gpu_partition"):
        for name in _names(getattr(site, key)):
            if there and name not in there:
                near = nearest(name, list(there))
                hint = f"did you mean {near}?" if near else f"there are {', '.join(there)}"
                problems.append(f"{key} = {name!r} ({PROFILE}): no such partition; {hint}")
    for rule, resources in (overwritten or {}).items():
        if "slurm_extra" in resources:
            problems.append(
                f"set-resources {rule}: slurm_extra would replace what the workflow asks for with it (the signal "
                f"before the time limit, the delay of a second attempt, GPUs): set it for all rules in {PROFILE}"
            )
    problems += _too_much(wiring, site, there, overwritten or {})
    problems += array_problems(wiring, site, executor_settings, at_once)
    if account and (problem := account_problem(account)):
        problems.append(problem)
    if problem := limit_problem(jobs):
        problems.append(problem)
    if problems:
        raise ConfigError("\n".join(problems))
    if getattr(executor_settings, "status_command", None) == "sacct":
        if _answers("sacct", "--noheader", "-X"):
            mend_sacct()
        else:
            executor_settings.status_command = "squeue"
    if getattr(executor_settings, "status_command", None) == "squeue":
        _warn_of_short_memory()


def _warn_of_short_memory() -> None:
    """Snakemake asks every 180 s at the longest, and waits for ever for a job that SLURM has forgotten by then."""
    age = get_min_job_age()
    if age is not None and age < REMEMBERED:
        log.warning(
            "this cluster has no sacct, and squeue forgets an ended job after %d s (MinJobAge): Snakemake may miss a "
            "job's end and wait for ever; ask for %d s",
            age,
            REMEMBERED,
        )


def _names(partition: str) -> list[str]:
    return [name for name in partition.split(",") if name]


def _too_much(wiring: Wiring, site: Site, there: dict[str, Partition], overwritten: Overwritten) -> list[str]:
    """Runs that ask for more than a node, or the partition, has; of what the profile replaces, nothing is said."""
    problems = []
    for name, run in wiring.runs.items():
        wildcards = Run(name)
        stages = [stage for stage in ("train", "evaluate", "verify_serving", "export")]
        for stage in stages if run.method.name != "none" else stages[1:]:
            gpus, nodes = wiring.gpus(stage, wildcards), wiring.nodes(stage, wildcards)
            partition_name = site.gpu_partition if gpus else site.cpu_partition
            choices = [there[name] for name in _names(partition_name) if name in there]
            replaced = overwritten.get(stage, {})
            if not choices or "slurm_partition" in replaced:
                continue
            limits = [choice.limit for choice in choices]
            partition = Partition(
                gpus=max(choice.gpus for choice in choices),
                limit=None if None in limits else max(limit for limit in limits if limit),
                nodes=max(choice.nodes for choice in choices),
            )
            key, where = f"resources.{stage}", f"partition {partition_name}"
            if gpus > partition.gpus:
                more = "; spread the run over more resources.train.nodes" if stage == "train" else ""
                problems.append(
                    f"run {name}: {key} asks for {gpus} GPUs of a node, but the nodes of {where} have {partition.gpus}"
                    + more
                )
            if nodes > partition.nodes:
                problems.append(f"run {name}: {key}.nodes is {nodes}, but {where} has {partition.nodes}")
            runtime = wiring.resources(stage, wildcards).runtime
            if partition.limit and runtime * 60 > partition.limit and "runtime" not in replaced:
                problems.append(
                    f"run {name}: {key}.runtime is {runtime} minutes, but {where} ends jobs after "
                    f"{partition.limit / 60:.0f}: lower it (training goes on in a new job by itself)"
                )
    return problems


def partitions() -> dict[str, Partition]:
    """The cluster's partitions by name; nothing where `sinfo` does not answer."""
    text = _output("sinfo", "--all", "--noheader", "--format=%R|%G|%l|%D")
    found: dict[str, Partition] = {}
    for line in (text or "").splitlines():
        name, gres, limit, nodes = (line.strip().split("|") + [""] * 4)[:4]
        gpus = sum(int(n) for n in re.findall(r"(?:^|,)gpu(?::[^:(),]+)?:(\d+)", gres))
        known = found.get(name, Partition(0, None, 0))
        seconds = parse_time(f"00:{limit}" if limit.count(":") == 1 else limit)  # 30:00 are minutes and seconds
        found[name] = Partition(max(gpus, known.gpus), seconds or known.limit, known.nodes + int(nodes or 0))
    return found


def account_problem(account: str) -> str | None:
    """Why this account cannot be charged; None where it can, or nobody says so."""
    listed = _associations("account")
    if listed is None:
        if _answers("sacct", "--noheader", "-X"):
            return None  # there are accounts, which this user may not list
        return (
            f"slurm_account = {account!r} ({PROFILE}): this cluster keeps no accounts (sacctmgr does not answer): "
            "leave slurm_account out"
        )
    accounts = sorted(set(listed.lower().split()))
    wrong = [name for name in account.replace(",", " ").split() if accounts and name.lower() not in accounts]
    if wrong:
        return f"slurm_account = {wrong[0]!r} ({PROFILE}): not one of yours, which are {', '.join(accounts)}"
    return None


def limit_problem(jobs: int | None) -> str | None:
    """Why so many jobs cannot be in the queue: sbatch refuses those above the site's limit, and runs would be lost."""
    limits = [int(line) for line in (_associations("maxsubmitjobs") or "").split() if line.isdigit()]
    if jobs is None or not limits or jobs <= min(limits):
        return None
    return (
        f"jobs = {jobs}: this cluster lets you have {min(limits)} jobs in the queue (MaxSubmitJobs): set jobs to "
        f"{min(limits)} or less, less what else you have there"
    )


def _associations(field: str) -> str | None:
    """A field of this user's associations, a line each; None where sacctmgr does not answer."""
    user = getpass.getuser()
    return _output("sacctmgr", "--noheader", "--parsable2", "list", "assoc", f"user={user}", f"format={field}")


def _answers(*command: str) -> bool:
    return _output(*command) is not None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, text=True, capture_output=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
