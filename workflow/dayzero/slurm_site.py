"""What a site cannot give is said before anything is submitted, in one line each."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from dayzero.config_errors import nearest
from dayzero.errors import ConfigError
from dayzero.slurm import SECONDS, parse_time
from dayzero.slurm_arrays import array_problems
from dayzero.snakemake_resources import Run, Site
from dayzero.wiring import Wiring

PROFILE = "default-resources of profiles/slurm/config.yaml"


@dataclass(frozen=True)
class Partition:
    """What `sinfo` says of a partition."""

    gpus: int
    """GPUs of its largest node."""
    limit: float | None
    """Time limit in seconds; None: none."""
    nodes: int


def check_site(wiring: Wiring, site: Site, account: str, executor_settings: Any) -> None:
    """Hold the profile and the runs against the cluster. Raises ConfigError with a line for each mistake.

    Where the cluster keeps no accounts (no sacct), job states are asked of squeue instead.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on PATH: start on a login node of a SLURM cluster (its SLURM module loaded), or leave out "
            "--profile slurm"
        )
    there = partitions()
    problems = []
    for key in ("cpu_partition", "gpu_partition"):
        name = getattr(site, key)
        if there and name and name not in there:
            near = nearest(name, list(there))
            hint = f"did you mean {near}?" if near else f"there are {', '.join(there)}"
            problems.append(f"{key} = {name!r} ({PROFILE}): no such partition; {hint}")
    problems += _too_much(wiring, site, there)
    problems += array_problems(wiring, site, executor_settings)
    if account and (problem := account_problem(account)):
        problems.append(problem)
    if problems:
        raise ConfigError("\n".join(problems))
    if getattr(executor_settings, "status_command", None) == "sacct" and not _answers("sacct", "--noheader", "-X"):
        executor_settings.status_command = "squeue"


def _too_much(wiring: Wiring, site: Site, there: dict[str, Partition]) -> list[str]:
    """Runs that ask for more than a node, or the partition, has."""
    problems = []
    for name, run in wiring.runs.items():
        wildcards = Run(name)
        stages = [stage for stage in ("train", "evaluate", "verify_serving", "export")]
        for stage in stages if run.method.name != "none" else stages[1:]:
            gpus, nodes = wiring.gpus(stage, wildcards), wiring.nodes(stage, wildcards)
            partition_name = site.gpu_partition if gpus else site.cpu_partition
            partition = there.get(partition_name)
            if partition is None:
                continue
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
            if partition.limit and runtime * 60 > partition.limit:
                problems.append(
                    f"run {name}: {key}.runtime is {runtime} minutes, but {where} ends jobs after "
                    f"{partition.limit / 60:.0f}: lower it (training goes on in a new job by itself)"
                )
    return problems


def partitions() -> dict[str, Partition]:
    """The cluster's partitions by name; nothing where `sinfo` does not answer."""
    text = _output("sinfo", "--noheader", "--format=%R|%G|%l|%D")
    found: dict[str, Partition] = {}
    for line in (text or "").splitlines():
        name, gres, limit, nodes = (line.strip().split("|") + [""] * 4)[:4]
        gpus = sum(int(n) for n in re.findall(r"(?:^|,)gpu(?::[^:(),]+)?:(\d+)", gres))
        known = found.get(name, Partition(0, None, 0))
        seconds = parse_time(limit if limit.count(":") else f"00:{limit}")
        found[name] = Partition(max(gpus, known.gpus), seconds or known.limit, known.nodes + int(nodes or 0))
    return found


def account_problem(account: str) -> str | None:
    """Why this account cannot be charged; None where it can, or nobody says so."""
    listed = _output("sacctmgr", "--noheader", "--parsable2", "list", "assoc", f"user={_user()}", "format=account")
    if listed is None:
        return (
            f"slurm_account = {account!r} ({PROFILE}): this cluster keeps no accounts (sacctmgr does not answer): "
            "leave slurm_account out"
        )
    accounts = sorted(set(listed.split()))
    if accounts and account not in accounts:
        return f"slurm_account = {account!r} ({PROFILE}): not one of yours, which are {', '.join(accounts)}"
    return None


def _user() -> str:
    return getpass.getuser()


def _answers(*command: str) -> bool:
    return _output(*command) is not None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, text=True, capture_output=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
