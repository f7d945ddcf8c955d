"""Accounts, and ends of jobs as sacct tells them, on a cluster that keeps both; the stages are stand-ins."""

from __future__ import annotations

from dataclasses import replace
from getpass import getuser
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Site
from tests.slurm.test_sweep import RUNS, SWEEP, StandIns, array_of_eight
from tests.workflow.project import make_project

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def site(site: Site, accounted: Cluster) -> Site:
    return replace(site, cluster=accounted, status_command="sacct")


@pytest.fixture
def sweep(site: Site, tmp_path: Path) -> StandIns:
    return StandIns(make_project(tmp_path / "sweep", SWEEP).path, site.cluster, site.status_command, site.started)


def charge(sweep: StandIns, account: str) -> None:
    profile = sweep.path / "profiles/slurm/config.yaml"
    profile.write_text(profile.read_text().replace("# slurm_account: my-project", f"slurm_account: {account}"))


def test_an_array_whose_last_task_fails_and_the_account_pays(sweep: StandIns) -> None:
    """In sacct's raw ids the last task is the array itself."""
    charge(sweep, "biology")
    sweep.fails = RUNS[-1]
    array_of_eight(sweep)
    listed = sweep.cluster.call("sacct", "-X", "--noheader", "--parsable2", "--format=WorkDir,Account,State")
    jobs = [job.split("|") for job in listed.splitlines()]
    own = [(account, state) for folder, account, state in jobs if folder == str(sweep.path)]  # of all on this cluster
    assert own.count(("biology", "FAILED")) == 1
    assert {account for account, _ in own} == {"biology"}


def test_an_account_of_others_is_refused_before_a_job_is_submitted(sweep: StandIns) -> None:
    charge(sweep, "chemistry")
    code, printed = sweep.finish(sweep.start("--until", "train"))
    assert code != 0
    (said,) = [line for line in printed.splitlines() if "slurm_account = 'chemistry'" in line]
    assert said.endswith("not one of yours, which are biology, physics, root")
    assert "submitted" not in printed


def test_no_more_jobs_than_the_site_allows(sweep: StandIns) -> None:
    limit = ("sacctmgr", "--immediate", "modify", "user", getuser(), "set", "MaxSubmitJobs={}")
    sweep.fails = "none"
    try:
        sweep.cluster.call(*limit[:-1], limit[-1].format(3))
        code, printed = sweep.finish(sweep.start("--until", "train"))
        assert code != 0
        assert "jobs = 100: this cluster lets you have 3 jobs in the queue (MaxSubmitJobs): set jobs to 3" in printed
        assert "submitted" not in printed
        sweep.run("--jobs", "3", "--retries", "0", "--until", "train")
        assert all((sweep.path / sweep.summary_file(run)).exists() for run in RUNS)
    finally:
        sweep.cluster.call(*limit[:-1], limit[-1].format(-1))
