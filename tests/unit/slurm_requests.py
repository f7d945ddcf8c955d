"""What a job of a stage asks of SLURM, for tests."""

from __future__ import annotations

from types import SimpleNamespace

from dayzero.config import RunConfig
from dayzero.experiment import Experiment
from dayzero.snakemake_resources import Site, job_resources
from dayzero.wiring import Wiring


def wiring(**values: object) -> Wiring:
    base = {"experiment": "exp", "train": {"max_steps": 1}, "data": {"source": "rows.jsonl"}}
    run = RunConfig.model_validate({**base, "model": {"source": "hf:org/m"}, "run": "a", **values})
    return Wiring(Experiment("exp", "", {"a": run}), "results")


def asked(stage: str, site: Site, attempt: int = 1, threads: int = 4, **values: object) -> dict[str, object]:
    """The resources of a job, without those that are empty."""
    it = SimpleNamespace(run="a")
    found: dict[str, object] = {}
    for name, value in job_resources(wiring(**values), site, stage).items():
        if not callable(value):
            found[name] = value
            continue
        more = {"attempt": attempt, "threads": threads}
        names = value.__code__.co_varnames[: value.__code__.co_argcount]
        found[name] = value(it, **{k: v for k, v in more.items() if k in names})
    return {k: v for k, v in found.items() if v}
