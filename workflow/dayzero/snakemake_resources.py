"""What each rule's job asks of SLURM, from the run's config and the profile's site keys; elsewhere, of this machine.

The keys that a site sets in its profile's `default-resources` and that are read here:
cpu_partition, gpu_partition, gpu_request (gres, gpus-per-node or gpus), gpu_type, small_runs, slurm_extra.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dayzero.config import TrainResources
from dayzero.errors import ConfigError
from dayzero.wiring import Wiring

GPU_REQUESTS = ("gres", "gpus-per-node", "gpus")
SIGNAL = "USR1"
ONE_NODE = "-N1"
"""For an allocation of several runs, whose GPUs SLURM would else gather from several nodes. Snakemake would add up the
resource `nodes` over them, and the executor refuses the option's other spellings."""
BACKOFF_SECONDS = 60
"""Delay before a job's second attempt; it doubles with each further one."""
MAX_BACKOFF_SECONDS = 3600


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a profile says of its site; without a SLURM profile, nothing. Raises ConfigError."""

    cpu_partition: str = ""
    gpu_partition: str = ""
    gpu_request: str = ""
    gpu_type: str = ""
    small_runs: str = ""
    """true: trainings of one node are ordinary jobs, which can share an allocation."""
    slurm_extra: str = ""
    """Further options of sbatch for every job."""

    def __post_init__(self) -> None:
        if self.gpu_request and self.gpu_request not in GPU_REQUESTS:
            raise ConfigError(
                f"gpu_request = {self.gpu_request!r} (default-resources of the profile): use {', '.join(GPU_REQUESTS)}"
            )

    @classmethod
    def of(cls, default_resources: Mapping[str, Any]) -> Site:
        """The site's keys among a profile's default resources. Raises ConfigError where only some are there."""
        site = cls(**{name: named(default_resources, name) for name in cls.__annotations__})
        given = [name for name in default_resources if name in cls.__annotations__ or name.startswith("slurm_")]
        if given and not site.is_slurm:
            raise ConfigError(not_a_site(f"{given[0]} is set"))
        return site

    @property
    def runs_are_small(self) -> bool:
        return self.small_runs.lower() == "true"

    @property
    def is_slurm(self) -> bool:
        return bool(self.gpu_request)


def not_a_site(why: str) -> str:
    """What is wrong where there is no gpu_request, without which jobs would ask SLURM for no nodes, GPUs or signal."""
    return (
        f"{why}, but gpu_request is not (default-resources): start with --profile slurm, and set all of them in "
        "profiles/slurm/config.yaml: --default-resources on the command line replaces the whole of the profile's"
    )


def named(default_resources: Mapping[str, Any], name: str) -> str:
    """The text of one default resource of a profile; nothing where it is not set.

    It is not yet evaluated there: a word in quotes is that word.
    """
    value = default_resources.get(name)
    return str(getattr(value, "raw", value) or "").strip("'\"")


def job_threads(wiring: Wiring, stage: str) -> Callable[..., int] | int:
    """The `threads:` of a rule."""
    return settled(wiring, lambda wildcards: wiring.resources(stage, wildcards).threads)


def job_resources(wiring: Wiring, site: Site, stage: str) -> dict[str, Any]:
    """The `resources:` of a rule: functions of its wildcards, or plain values where all runs ask for the same."""
    functions = _functions(wiring, site, stage)
    return {name: settled(wiring, function) for name, function in functions.items()}


def launch_arguments(wiring: Wiring) -> Any:
    """The machine settings of training as arguments."""
    return settled(wiring, lambda wildcards: wiring.launch_arguments(wildcards))


@dataclass(frozen=True)
class Run:
    """The wildcards of a rule with a job for each run."""

    run: str


def settled(wiring: Wiring, function: Callable[..., Any]) -> Any:
    """The one value of a function of the run alone, where all runs have the same: Snakemake calls a function several
    times for each of thousands of jobs."""
    if function.__code__.co_argcount > 1:
        return function
    values = [function(Run(name)) for name in wiring.runs]
    return values[0] if all(value == values[0] for value in values) else function


def by_run(wiring: Wiring, function: Callable[[str], Any]) -> Any:
    """What a rule asks of its run by name, as an input or a parameter: the value itself, with {run} for the name, where
    all runs' values differ in nothing else, and a function of the wildcards where they do."""
    values = {name: function(name) for name in wiring.runs}
    first = next(iter(values))
    pattern = _replaced(values[first], f"/{first}/", "/{run}/")
    plain = not any("{" in text for value in values.values() for text in _texts(value))
    if plain and all(_replaced(pattern, "{run}", name) == value for name, value in values.items()):
        return pattern
    return lambda wildcards: function(wildcards.run)


def _texts(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _replaced(value: str | list[str], old: str, new: str) -> str | list[str]:
    return value.replace(old, new) if isinstance(value, str) else [text.replace(old, new) for text in value]


def _functions(wiring: Wiring, site: Site, stage: str) -> dict[str, Callable[..., Any]]:
    resources: dict[str, Callable[..., Any]] = {
        "mem_mb": lambda wildcards: wiring.resources(stage, wildcards).mem_mb,
        "runtime": lambda wildcards: wiring.resources(stage, wildcards).runtime,
        "gpu": lambda wildcards: wiring.gpus(stage, wildcards) * wiring.nodes(stage, wildcards),
    }
    if not site.is_slurm:
        return resources
    train = stage == "train"
    if train and site.runs_are_small:
        for name, run in wiring.runs.items():
            if run.resources.train.nodes > 1:
                raise ConfigError(
                    f"small_runs is true (default-resources of the profile), but run {name} has resources.train.nodes "
                    f"{run.resources.train.nodes}: set small_runs to false"
                )
    resources["slurm_partition"] = lambda wildcards: (
        site.gpu_partition if wiring.gpus(stage, wildcards) else site.cpu_partition
    )
    resources["slurm_extra"] = lambda wildcards, attempt: _extra(wiring, site, stage, wildcards, attempt)
    resources["gpu"] = lambda wildcards: _gpus_by("gpus", wiring, site, stage, wildcards)
    if site.gpu_request == "gres":
        resources["gres"] = lambda wildcards: _named(site, "gpu:", _gpus_by("gres", wiring, site, stage, wildcards))
    if site.gpu_type:
        resources["gpu_model"] = lambda wildcards: (
            site.gpu_type if _gpus_by("gpus", wiring, site, stage, wildcards) else ""
        )
    if train and not site.runs_are_small:
        # with `mpi` the rule's shell runs once, in the batch script, and starts the nodes itself; two tasks or more on
        # each node, which the plugin wants, share the node's CPUs
        resources["mpi"] = lambda wildcards: "srun"
        resources["nodes"] = lambda wildcards: wiring.nodes(stage, wildcards)
        resources["tasks_per_node"] = lambda wildcards: max(2, wiring.processes(wildcards))
        resources["cpus_per_task"] = lambda wildcards, threads: max(1, threads // max(2, wiring.processes(wildcards)))
    return resources


def _extra(wiring: Wiring, site: Site, stage: str, wildcards: Any, attempt: int) -> str:
    options = []
    if gpus := _gpus_by("gpus-per-node", wiring, site, stage, wildcards):
        options.append(_named(site, "--gpus-per-node=", gpus))
    asked = wiring.resources(stage, wildcards)
    if isinstance(asked, TrainResources) and asked.stop_before and not site.runs_are_small:
        options.append(f"--signal={SIGNAL}@{asked.stop_before}")
    if stage == "train" and site.runs_are_small:
        options.append(ONE_NODE)
    if attempt > 1:
        options.append(f"--begin=now+{backoff(attempt)}")
    if site.slurm_extra:
        options.append(site.slurm_extra)
    return " ".join(options)


def _gpus_by(request: str, wiring: Wiring, site: Site, stage: str, wildcards: Any) -> int:
    """GPUs (of each node) that the stage asks for by that one of `GPU_REQUESTS`; none where it asks by another."""
    used = site.gpu_request
    if stage == "train" and site.runs_are_small:
        used = "gpus"  # of jobs in one allocation Snakemake adds up numbers, not texts
    elif used == "gpus" and wiring.nodes(stage, wildcards) > 1:
        used = "gpus-per-node"  # else one node might be given more of them than another
    return wiring.gpus(stage, wildcards) if used == request else 0


def backoff(attempt: int) -> int:
    """Seconds that SLURM holds back a job's n-th attempt."""
    return min(BACKOFF_SECONDS * 2 ** (attempt - 2), MAX_BACKOFF_SECONDS)


def _named(site: Site, prefix: str, gpus: int) -> str:
    if not gpus:
        return ""
    return f"{prefix}{site.gpu_type}:{gpus}" if site.gpu_type else f"{prefix}{gpus}"
