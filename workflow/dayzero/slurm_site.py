"""What a site cannot give is said before anything is submitted, in one line each."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dayzero.config import Resources
from dayzero.config_errors import did_you_mean
from dayzero.console import log
from dayzero.errors import ConfigError
from dayzero.slurm import parse_time
from dayzero.slurm_accounts import PROFILE, account_problem, answer, limit_problems
from dayzero.slurm_arrays import array_problems
from dayzero.slurm_groups import group_problems, mend_groups
from dayzero.slurm_plugin import get_min_job_age, leave_sacct_alone, mend_sacct, mend_submission
from dayzero.snakemake_resources import Run, Site, named, not_a_site
from dayzero.wiring import Wiring

REMEMBERED = 300
"""Seconds for which squeue must know an ended job, where there is no sacct."""
ON_THE_LOGIN_NODE = ("fetch", "report")
"""Stages that ask SLURM for nothing."""
FEW = 4
"""As many runs are all named."""
WORD = re.compile(r"[\w.-]+", re.ASCII)
"""A name, and no expression that Snakemake evaluates for each job."""
ANY_TYPE = "gpus-per-node"
"""The one of `GPU_REQUESTS` that the executor does not look at."""
GPU_TYPE = re.compile(r"[\w.]*", re.ASCII)
"""Types of GPUs that the executor takes in --gres and --gpus."""


@dataclass(frozen=True)
class Partition:
    """What `sinfo` says of a partition."""

    gpus: int
    """GPUs of its largest node."""
    limit: float | None
    """Time limit in seconds; None: none."""
    nodes: int
    is_default: bool = False
    """Jobs that name no partition go there."""
    types: tuple[str, ...] = ()
    """The types of its GPUs; an empty one for those that have none."""


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
    qos: str = "",
    groups: Mapping[str, str] | None = None,
    components: Mapping[str, int] | None = None,
) -> None:
    """Hold the profile and the runs against the cluster. Raises ConfigError with a line for each mistake.

    Where the cluster keeps no accounts (no sacct), job states are asked of squeue instead.

    Args:
        at_once: jobs that Snakemake hands over together at most. None: any number.
        jobs: how many Snakemake keeps in the queue at most.
        qos: the profile's quality of service.
        groups: by rule, the group whose jobs share allocations; `components`: how many of a group share one.
    """
    if not site.is_slurm:
        raise ConfigError(not_a_site("executor: slurm is set"))
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on PATH: start on a login node of a SLURM cluster (its SLURM module loaded), or leave out "
            "--profile slurm"
        )
    there, overwritten = partitions(site.gpu_type), overwritten or {}
    problems = []
    for key in ("cpu_partition", "gpu_partition"):
        for name in _names(getattr(site, key)):
            if there and name not in there:
                problems.append(f"{key} = {name!r} ({PROFILE}): no such partition; {did_you_mean(name, there)}")
    for rule, resources in overwritten.items():
        for name in _names(named(resources, "slurm_partition")):
            if there and name not in there and WORD.fullmatch(name):
                problems.append(
                    f"set-resources {rule}: slurm_partition = {name!r}: no such partition; {did_you_mean(name, there)}"
                )
        if "slurm_extra" in resources:
            problems.append(
                f"set-resources {rule}: slurm_extra would replace what the workflow asks for with it (the signal "
                f"before the time limit, the delay of a second attempt, GPUs): set it for all rules in {PROFILE}"
            )
    if problem := _type_problem(site):
        problems.append(problem)
    # by a file of its own the executor chooses for each job
    own_choice = getattr(executor_settings, "partition_config", None) or os.environ.get("SNAKEMAKE_SLURM_PARTITIONS")
    default = "" if own_choice else next((name for name, partition in there.items() if partition.is_default), "")
    problems += _too_much(wiring, site, there, overwritten, default)
    problems += array_problems(wiring, site, executor_settings, at_once)
    replaced = "slurm_partition" in overwritten.get("train", {})
    together = replace(site, cpu_partition="", gpu_partition="") if replaced else site
    choices = [] if replaced else [there[name] for name in _names(site.gpu_partition or default) if name in there]
    on_a_node = max((choice.gpus for choice in choices), default=None)
    problems += group_problems(wiring, together, groups or {}, components or {}, on_a_node)
    if account and (problem := account_problem(account)):
        problems.append(problem)
    qos = qos or str(getattr(executor_settings, "qos", None) or "")
    rules_qos = [name for resources in overwritten.values() if (name := named(resources, "qos"))]
    problems += limit_problems(jobs, account, qos, rules_qos)
    if problems:
        raise ConfigError("\n".join(problems))
    mend_submission(wiring.name)
    if groups:
        mend_groups()
    if getattr(executor_settings, "status_command", None) in ("sacct", "squeue"):
        if answer("sacct", "--noheader", "-X") is not None:
            mend_sacct()
        else:
            executor_settings.status_command = "squeue"
            leave_sacct_alone()
    if getattr(executor_settings, "status_command", None) == "squeue":
        _warn_of_short_memory()


def _type_problem(site: Site) -> str | None:
    """Why the executor would refuse every job that asks for this type of GPU; None where it takes it."""
    if GPU_TYPE.fullmatch(site.gpu_type) or (site.gpu_request == ANY_TYPE and not site.runs_are_small):
        return None
    more = " and small_runs: false" if site.runs_are_small else ""
    return (
        f"gpu_type = {site.gpu_type!r} ({PROFILE}): in --gres and --gpus the executor takes letters, digits, _ and . "
        f"alone: set gpu_request: \"'{ANY_TYPE}'\"{more}"
    )


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


@dataclass(frozen=True)
class _Shared:
    """The wildcards of a rule with a job for each key of the store."""

    key: str


def _jobs(wiring: Wiring) -> Iterator[tuple[str, str, str, Run | _Shared]]:
    """Every job on a compute node: its rule, its stage in `resources`, the run whose resources it asks for, and its
    wildcards; what runs share comes once."""
    shared = {
        "check_data": ("check_data", wiring.results("check")),
        "train_tokenizer": ("tokenize", [wiring.tokenizer(run) for run in wiring.runs.values() if run.model.tokenizer]),
        "tokenize": ("tokenize", [wiring.tokens(run) for run in wiring.runs.values()]),
    }
    for rule, (stage, places) in shared.items():
        for key in dict.fromkeys(Path(place.removesuffix("/manifest.json")).name for place in places):
            yield rule, stage, wiring.of_key(key).run, _Shared(key)
    stages = [stage for stage in Resources.model_fields if stage not in (*ON_THE_LOGIN_NODE, "check_data", "tokenize")]
    for name, run in wiring.runs.items():
        left_out = {"train"} if not wiring.trained(name) else set()
        left_out |= {"evaluate"} if not (run.evaluate.tasks or run.evaluate.extra_tasks) else set()
        yield from ((stage, stage, name, Run(name)) for stage in stages if stage not in left_out)


def _too_much(
    wiring: Wiring, site: Site, there: dict[str, Partition], overwritten: Overwritten, default: str
) -> list[str]:
    """Jobs that ask for more than a node, or the partition, has, equal ones in one line; of what the profile replaces,
    nothing is said.

    `default`: the partition of jobs that name none. Empty: not known.
    """
    asking: dict[str, list[str]] = {}
    for rule, stage, run, wildcards in _jobs(wiring):
        gpus, nodes = wiring.gpus(stage, wildcards), wiring.nodes(stage, wildcards)
        partition_name = (site.gpu_partition if gpus else site.cpu_partition) or default
        choices = [there[name] for name in _names(partition_name) if name in there]
        replaced = overwritten.get(rule, {})
        if not choices or "slurm_partition" in replaced:
            continue
        limits = [choice.limit for choice in choices]
        partition = Partition(
            gpus=max(choice.gpus for choice in choices),
            limit=None if None in limits else max(limit for limit in limits if limit),
            nodes=max(choice.nodes for choice in choices),
            types=tuple(dict.fromkeys(kind for choice in choices for kind in choice.types)),
        )
        key, where, problems = f"resources.{stage}", f"partition {partition_name}", []
        if gpus > partition.gpus:
            of_type = f" of type {site.gpu_type}" if site.gpu_type else ""
            more = "; spread the run over more resources.train.nodes" if stage == "train" else ""
            if of_type and not partition.gpus and partition.types:
                types = ", ".join(kind or "\"''\" (any)" for kind in partition.types)
                more = f"; gpu_type ({PROFILE}) can be {types}"
            problems.append(
                f"{key} asks for {gpus} GPUs of a node, but the nodes of {where} have {partition.gpus}{of_type}{more}"
            )
        if nodes > partition.nodes:
            problems.append(f"{key}.nodes is {nodes}, but {where} has {partition.nodes}")
        runtime = wiring.resources(stage, wildcards).runtime
        if partition.limit and runtime * 60 > partition.limit and "runtime" not in replaced:
            more = " (training goes on in a new job by itself)" if stage == "train" else ""
            problems.append(
                f"{key}.runtime is {runtime} minutes, but {where} ends jobs after "
                f"{partition.limit / 60:.0f}: lower it{more}"
            )
        for problem in problems:
            asking.setdefault(problem, []).append(run)
    return [f"{_named_runs(runs)}: {problem}" for problem, runs in asking.items()]


def _named_runs(runs: list[str]) -> str:
    """Runs in words; of many the first and the last."""
    runs = list(dict.fromkeys(runs))
    if len(runs) == 1:
        return f"run {runs[0]}"
    return f"runs {', '.join(runs)}" if len(runs) <= FEW else f"runs {runs[0]} ... {runs[-1]} ({len(runs)})"


def partitions(gpu_type: str = "") -> dict[str, Partition]:
    """The cluster's partitions by name, with their GPUs of that type (empty: of any); nothing where `sinfo` does not
    answer."""
    text = answer("sinfo", "--all", "--noheader", "--format=%P|%G|%l|%D")
    found: dict[str, Partition] = {}
    for line in (text or "").splitlines():
        name, gres, limit, nodes = (line.strip().split("|") + [""] * 4)[:4]
        is_default, name = name.endswith("*"), name.removesuffix("*")
        counted = re.findall(r"(?:^|,)gpu(?::([^:(),]+))?:(\d+)", gres)
        gpus = sum(int(number) for kind, number in counted if gpu_type in ("", kind))
        known = found.get(name, Partition(0, None, 0))
        types = dict.fromkeys((*known.types, *(kind for kind, _ in counted)))
        seconds = parse_time(f"00:{limit}" if limit.count(":") == 1 else limit)  # 30:00 are minutes and seconds
        found[name] = Partition(
            max(gpus, known.gpus), seconds or known.limit, known.nodes + int(nodes or 0), is_default, tuple(types)
        )
    return found
