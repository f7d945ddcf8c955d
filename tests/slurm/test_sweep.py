"""Sweeps and mistakes on a real cluster; the stages are stand-ins, the jobs are SLURM's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import HERE, Site
from tests.workflow.project import ROOT, STAND_IN, TINY, make_project

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

RUNS = [f"s{i}" for i in range(8)]
SWEEP = TINY[: TINY.index("runs:")].replace("{max_steps: 2,", "{max_steps: 2, ") + (
    "  resources: {train: {threads: 1, mem_mb: 500, runtime: 30}, tokenize: {mem_mb: 500, threads: 1}}\n"
    "runs:\n" + "".join(f"  {run}: {{seed: {i}}}\n" for i, run in enumerate(RUNS))
)


class StandIns(Site):
    """A site whose jobs are stand-ins; the training of the run `fails` fails."""

    fails = "s3"

    @property
    def environment(self) -> dict[str, str]:
        path = f"{STAND_IN}{os.pathsep}{ROOT / 'workflow'}"
        return {**super().environment, "PYTHONPATH": path, "STAND_IN_FAILS": f"results/tiny/{self.fails}/train"}


@pytest.fixture
def sweep(site: Site, tmp_path: Path) -> StandIns:
    return StandIns(make_project(tmp_path / "sweep", SWEEP).path, site.cluster, site.status_command, site.started)


def test_eight_small_runs_of_which_one_fails(sweep: StandIns) -> None:
    code, printed = sweep.finish(sweep.start("--retries", "0", "--until", "train"))
    assert code != 0
    trained = {run for run in RUNS if (sweep.path / sweep.summary_file(run)).exists()}
    assert trained == {*RUNS} - {"s3"}, printed
    table = printed[printed.index("1 failed") :]
    assert all(word in table for word in ("s3", "train", "made to fail"))


class SideBySide(StandIns):
    """Trainings that end only where four of a job run at the same time."""

    @property
    def environment(self) -> dict[str, str]:
        path = f"{HERE / 'together'}{os.pathsep}{ROOT / 'workflow'}"
        return {**super().environment, "PYTHONPATH": path, "TOGETHER": "4"}


def test_small_runs_share_an_allocation(sweep: StandIns) -> None:
    """Eight trainings, four to a job, all four at the same time; one fails, and takes no other's result with it."""
    profile = sweep.path / "profiles/slurm/config.yaml"
    profile.write_text(profile.read_text().replace("small_runs: false", "small_runs: true"))
    grouped = ["--groups", "train=small", "--group-components", "small=4", "--retries", "0", "--until", "train"]
    sweep.run("--until", "tokenize", "check_data")
    before = sweep.cluster.jobs()
    small = SideBySide(sweep.path, sweep.cluster, sweep.status_command, sweep.started)
    code, printed = small.finish(small.start(*grouped))
    assert code != 0
    jobs = sweep.cluster.jobs().keys() - before.keys()
    assert len(jobs) == 2
    trained = {run for run in RUNS if (sweep.path / sweep.summary_file(run)).exists()}
    assert trained == {*RUNS} - {"s3"}, printed + sweep.job_logs()
    table = printed[printed.index("1 failed") :]
    assert all(word in table for word in ("s3", "train", "made to fail"))
    assert any(f" {job} " in table for job in jobs)
    results = {run: (sweep.path / sweep.summary_file(run)).read_text() for run in trained}
    sweep.fails = "none"
    sweep.run(*grouped)
    assert (sweep.path / sweep.summary_file("s3")).exists()
    assert {run: (sweep.path / sweep.summary_file(run)).read_text() for run in trained} == results


def test_runs_that_differ_share_no_allocation(sweep: StandIns) -> None:
    profile = sweep.path / "profiles/slurm/config.yaml"
    profile.write_text(profile.read_text().replace("small_runs: false", "small_runs: true"))
    more = ["--config", "set=runs.s5.resources.train.stop_before=90"]
    code, printed = sweep.finish(sweep.start("--groups", "train=small", "--group-components", "small=4", *more))
    assert code != 0
    assert "groups train=small: runs s0 and s5 differ in resources.train.stop_before" in printed
    assert "submitted" not in printed


def array_of_eight(sweep: StandIns) -> None:
    """All but the run that fails keep their results, and no task is judged by another's end."""
    sweep.run("--until", "tokenize", "check_data")
    before = sweep.cluster.jobs()
    code, printed = sweep.finish(
        sweep.start("--retries", "0", "--slurm-array-jobs", "train", "--slurm-array-limit", "30", "--until", "train")
    )
    assert code != 0
    trained = {run for run in RUNS if (sweep.path / sweep.summary_file(run)).exists()}
    assert trained == {*RUNS} - {sweep.fails}, printed
    for run in trained:  # each task has trained its own run
        assert f"results/tiny/{run}/train" in (sweep.path / f"results/tiny/{run}/logs/train.log").read_text()
    table = printed[printed.index("1 failed") :]
    assert all(word in table for word in (sweep.fails, "train", "made to fail"))
    tasks = sorted(sweep.cluster.jobs().keys() - before.keys())
    assert len(tasks) == 8
    assert {task.partition("_")[2] for task in tasks} == {str(i) for i in range(1, 9)}
    assert len({task.partition("_")[0] for task in tasks}) == 1


def test_runs_that_differ_make_no_array(sweep: StandIns) -> None:
    more = ["--config", "set=runs.s5.resources.train.mem_mb=700"]
    code, printed = sweep.finish(sweep.start("--slurm-array-jobs", "train", "--slurm-array-limit", "30", *more))
    assert code != 0
    assert "runs s0 and s5 ask for different resources.train" in printed
    assert "submitted" not in printed


@pytest.mark.parametrize(
    ("line", "instead", "says"),
    [
        ("cpu_partition: \"''\"", "cpu_partition: cpuu", "cpu_partition = 'cpuu' (default-resources of"),
        ("# slurm_account: my-project", "slurm_account: nobody", "slurm_account = 'nobody'"),
        (
            "gpu_partition: \"''\"",
            "gpu_partition: gpu",
            "asks for 4 GPUs of a node, but the nodes of partition gpu have 2",
        ),
    ],
)
def test_what_the_cluster_has_not_is_said_in_one_line(sweep: StandIns, line: str, instead: str, says: str) -> None:
    profile = sweep.path / "profiles/slurm/config.yaml"
    assert line in profile.read_text()
    profile.write_text(profile.read_text().replace(line, instead))
    more = ["--config", "set=resources.train.gpu=4"] if "GPUs" in says else []
    code, printed = sweep.finish(sweep.start(*more))
    assert code != 0
    (said,) = [text for text in printed.splitlines() if says in text and "run s" not in text.replace("run s0:", "")]
    assert not said.startswith(" ")
    assert "Traceback" not in printed
    assert "submitted" not in printed


def test_without_sbatch(sweep: StandIns) -> None:
    (sweep.path / "bin").mkdir()
    for name in ("bash", "sh", "which"):
        (sweep.path / "bin" / name).symlink_to(f"/usr/bin/{name}")
    environment = {**sweep.environment, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{sweep.path / 'bin'}"}
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--profile", "slurm"],
        cwd=sweep.path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode != 0
    assert "sbatch is not on PATH: start on a login node" in done.stdout
