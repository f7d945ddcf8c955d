"""Small runs that share an allocation: what the batch script's Snakemake becomes, what cannot be, and what is kept."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import snakemake_executor_plugin_slurm as plugin
from dayzero import slurm
from dayzero.config import RunConfig
from dayzero.experiment import Experiment
from dayzero.slurm_groups import group_command, group_problems, mend_groups
from dayzero.snakemake_resources import Site
from dayzero.wiring import Wiring
from snakemake.jobs import GroupJob

ARGV = shlex.split(
    "/x/snakemake/__main__.py --snakefile /p/Snakefile --target-jobs train:run=a train:run=b --allowed-rules train "
    "--local-groupid 7f --cores all --attempt 1 --executor slurm-jobstep --jobs 1 --mode remote"
)
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_CPUS_PER_TASK": "4",
    "SLURM_GPUS": "2",
    "SLURM_NTASKS": "1",
    "SBATCH_X": "1",
    "A": "b",
}


def test_a_group_of_trainings_is_one_step_with_the_whole_allocation() -> None:
    command, environment = group_command(ARGV, BATCH) or ([], {})
    assert command[0] == "srun"
    assert {"--ntasks=1", "--cpus-per-task=4", "--gpus=2"} <= {*command}
    assert "--executor slurm-jobstep" not in " ".join(command)
    assert "--jobs" not in command
    assert command[-3:] == ["--cores", "4", "--keep-going"]
    assert " ".join(command).count("--target-jobs train:run=a train:run=b --allowed-rules") == 1
    assert environment == {"SLURM_JOB_ID": "7", "A": "b", slurm.SHARED_BY: "2"}


@pytest.mark.parametrize(
    "argv",
    [
        ARGV[:1],
        [word for word in ARGV if word not in ("--local-groupid", "7f")],  # a single job
        [word.replace("train:run=b", "evaluate:run=b") for word in ARGV],  # which would share a GPU
        [word for word in ARGV if word != "slurm-jobstep"],
    ],
)
def test_other_processes_stay_what_they_are(argv: list[str]) -> None:
    assert group_command(argv, BATCH) is None


def test_gpus_of_a_shared_job_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho JobId=7 NumNodes=1 TresPerJob=gres:gpu:8\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv(slurm.SHARED_BY, "4")
    job = slurm.current_job()
    assert job
    assert job.gpus == 2


SITE = Site(gpu_request="gres", small_runs="true", cpu_partition="cpu", gpu_partition="gpu")


def problems(site: Site = SITE, together: int = 2, on_a_node: int | None = 4, **other: Any) -> list[str]:
    """Of the runs a and b, which differs by `other`."""
    base = {"experiment": "e", "train": {"max_steps": 1}, "data": {"source": "r.jsonl"}, "model": {"source": "hf:o/m"}}
    runs = {name: RunConfig.model_validate({**base, "run": name}) for name in ("a", "b")}
    runs["b"] = RunConfig.model_validate({**base, "run": "b", "resources": {"train": other}})
    if "gpu" not in other:
        gpu = {"resources": {"train": {**other, "gpu": 1}}}
        runs = {name: RunConfig.model_validate({**base, "run": name, **gpu}) for name in runs}
    return group_problems(
        Wiring(Experiment("e", "", runs), "results"), site, {"train": "s"}, {"s": together}, on_a_node
    )


def test_runs_that_may_share_an_allocation() -> None:
    assert problems() == problems(on_a_node=None) == problems(together=1, gpu=1) == []
    assert problems(gpu=0, mem_mb=9000, runtime=500, threads=3) == []  # numbers are added up
    assert problems(replace(SITE, gpu_partition="cpu"), gpu=1) == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"gpu": 0, "stop_before": 90}, r"runs a and b differ in resources.train.stop_before \(120 and 90\), and jobs"),
        ({"gpu": 0, "max_requeues": 3}, r"runs a and b differ in resources.train.max_requeues \(100 and 3\)"),
        ({"gpu": 0, "network_interface": "ib0"}, r"resources.train.network_interface \(None and 'ib0'\)"),
        ({"gpu": 1}, r"their partition, by resources.train.gpu \('cpu' and 'gpu'\)"),
        (
            {"gpu": 1, "site": replace(SITE, gpu_partition="cpu", gpu_type="a100")},
            r"gpu_type, by resources.train.gpu \('' and 'a100'\)",
        ),
        (
            {"on_a_node": 1},
            r"group-components s=2: that many trainings ask for 2 GPUs of one node, .* have 1: set it to 1",
        ),
        ({"site": replace(SITE, small_runs="")}, r"groups train=s: small_runs is not true: set it"),
    ],
)
def test_runs_that_may_not(given: dict[str, Any], says: str) -> None:
    (said,) = problems(**given)
    assert re.search(says, said), said
    assert "\n" not in said


@pytest.fixture
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def conclude(group: Any, error: bool = False, **_: Any) -> None:
        assert not error

    monkeypatch.setattr(plugin.Executor, "run_job", lambda *_: None)
    monkeypatch.setattr(GroupJob, "postprocess", conclude)
    monkeypatch.setattr(GroupJob, "log_error", lambda *_, **__: None)
    mend_groups()


def test_what_had_finished_in_a_failed_group_is_kept(mended: None, tmp_path: Path) -> None:
    """And no file that lay there before."""
    concluded: dict[str, bool] = {}

    def member(name: str) -> SimpleNamespace:
        async def postprocess(error: bool, **_: Any) -> None:
            concluded[name] = error

        return SimpleNamespace(
            output=[tmp_path / name / "metrics", tmp_path / name / "summary"], postprocess=postprocess
        )

    jobs = [member(name) for name in ("good", "failed", "half", "old")]
    for job in jobs:
        job.output[0].parent.mkdir()
    for file in jobs[3].output:
        file.touch()
    group = SimpleNamespace(jobs=jobs, output=[file for job in jobs for file in job.output], is_group=lambda: True)
    plugin.Executor.run_job(None, group)
    for file in [*jobs[0].output, jobs[2].output[0]]:
        file.touch()
    asyncio.run(GroupJob.postprocess(group, error=True))
    assert concluded == {"good": False, "failed": True, "half": True, "old": True}
    plugin.Executor.run_job(None, group)  # a second try, which ends before it begins
    asyncio.run(GroupJob.postprocess(group, error=True))
    assert concluded["good"] is False


def test_a_failed_group_says_why(mended: None, caplog: pytest.LogCaptureFixture) -> None:
    group = SimpleNamespace(groupid="small")
    GroupJob.log_error(group, "SLURM sbatch failed.", aux_logs=[])
    assert caplog.messages == ["Failed group small: SLURM sbatch failed."]
    GroupJob.log_error(group)
    assert len(caplog.messages) == 1
