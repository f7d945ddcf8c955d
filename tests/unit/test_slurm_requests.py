"""What a stage asks of SLURM, and machine settings that cannot be."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from dayzero.config import RunConfig
from dayzero.config_checks import impossible
from dayzero.errors import ConfigError
from dayzero.snakemake_resources import Site, backoff
from snakemake_executor_plugin_slurm.validation import get_forbidden_slurm_options, validate_slurm_extra

from tests.unit.slurm_requests import asked

NODES = {"parallelism": {"dp_shard": 8}, "resources": {"train": {"nodes": 2, "gpu": "auto"}}}


@pytest.mark.parametrize(
    ("site", "gpus"),
    [
        ({"gpu_request": "gres"}, {"gres": "gpu:4"}),
        ({"gpu_request": "gres", "gpu_type": "a100"}, {"gres": "gpu:a100:4"}),
        ({"gpu_request": "gpus-per-node", "gpu_type": "h100"}, {"slurm_extra": "--gpus-per-node=h100:4"}),
        ({"gpu_request": "gpus", "gpu_type": "h100"}, {"slurm_extra": "--gpus-per-node=h100:4"}),
    ],
)
def test_gpus_are_asked_for_as_the_site_wants_it(site: dict[str, str], gpus: dict[str, object]) -> None:
    found = asked("train", Site(gpu_partition="g", cpu_partition="c", **site), **NODES)
    assert found["slurm_partition"] == "g"
    assert found["slurm_extra"] == " ".join(filter(None, [str(gpus.pop("slurm_extra", "")), "--signal=USR1@120"]))
    assert {k: found[k] for k in found if k in ("gpu", "gres", "gpu_model")} == gpus
    assert (found["nodes"], found["tasks_per_node"], found["cpus_per_task"], found["mpi"]) == (2, 4, 1, "srun")


@pytest.mark.parametrize("request_by", ["gres", "gpus-per-node", "gpus"])
def test_small_runs_ask_for_gpus_by_number(request_by: str) -> None:
    """Which Snakemake adds up over the runs of an allocation."""
    found = asked("train", Site(gpu_request=request_by, small_runs="true"), resources={"train": {"gpu": 1}})
    assert found["gpu"] == 1
    assert found["slurm_extra"] == "-N1"  # else SLURM may gather the GPUs from several nodes
    validate_slurm_extra(SimpleNamespace(resources=SimpleNamespace(**found)))
    assert not {"gres", "mpi"} & found.keys()


def test_a_sites_own_options_are_added_to_ours() -> None:
    site = Site(gpu_request="gpus", gpu_type="h100", slurm_extra="--exclusive")
    one = asked("train", site, parallelism={"dp_shard": 4}, resources={"train": {"gpu": "auto"}})
    assert (one["gpu"], one["gpu_model"]) == (4, "h100")
    assert one["slurm_extra"] == "--signal=USR1@120 --exclusive"
    assert asked("export", site)["slurm_extra"] == "--exclusive"


def test_cpu_stages_go_to_the_cpu_partition() -> None:
    site = Site(gpu_partition="g", cpu_partition="c", gpu_request="gres")
    assert asked("export", site, **NODES) == {"mem_mb": 6000, "runtime": 60, "slurm_partition": "c"}
    assert asked("train", site)["slurm_partition"] == "c"
    assert (asked("train", site)["tasks_per_node"], asked("train", site)["cpus_per_task"]) == (2, 2)


def test_without_a_slurm_profile_nothing_of_slurm_is_asked_for() -> None:
    assert asked("train", Site(), **NODES) == {"mem_mb": 6000, "runtime": 240, "gpu": 8}


def test_the_plugin_takes_every_extra_option() -> None:
    site = Site(gpu_request="gpus-per-node", gpu_type="a100")
    extra = str(asked("train", site, attempt=3, **NODES)["slurm_extra"])
    assert extra == "--gpus-per-node=a100:4 --signal=USR1@120 --begin=now+120"
    assert not [name for pattern, name in get_forbidden_slurm_options().items() if re.search(pattern, extra)]


def test_each_attempt_waits_longer_but_not_for_ever() -> None:
    assert [backoff(attempt) for attempt in (2, 3, 4, 40)] == [60, 120, 240, 3600]


def test_a_wrong_way_to_ask_for_gpus() -> None:
    with pytest.raises(ConfigError, match=r"gpu_request = 'gpu' .*: use gres, gpus-per-node, gpus"):
        Site(gpu_request="gpu")


@pytest.mark.parametrize(
    ("train", "key", "says"),
    [
        ({"nodes": 3}, "nodes", "4 processes, and 4 % nodes 3 = 1"),
        ({"gpu": 2}, "gpu", "4 processes / nodes 1 = 4 on each node, but gpu is 2"),
        ({"runtime": 2, "stop_before": 120}, "stop_before", "120 s before the end of a job of 2 minutes"),
    ],
)
def test_impossible_machine_settings(train: dict[str, int], key: str, says: str) -> None:
    values = {"parallelism": {"dp_shard": 4}, "train": {"max_steps": 1}, "resources": {"train": train}}
    run = RunConfig.model_validate(
        {"experiment": "e", "run": "a", "model": {"source": "m"}, "data": {"source": "d"}, **values}
    )
    (found,) = [finding for finding in impossible(run) if finding.key.startswith("resources")]
    assert found.key == f"resources.train.{key}"
    assert says in found.message
