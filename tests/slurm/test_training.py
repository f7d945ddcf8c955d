"""Training on a real SLURM cluster of two virtual nodes, through every fault.

The runs that meet a fault are equal but for their names, so each must end with the very curve of `reference`, which
nothing disturbed and which ran without SLURM, on the local profile. The cluster keeps accounts, as most sites do, so
Snakemake learns from sacct how its jobs ended; on the cluster of the other tests, which keeps none, from squeue.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from dayzero.files import read_json
from dayzero.slurm import parse_job

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Site
from tests.small_disk import mounted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def status(site: Site, run: str) -> dict[str, object]:
    """The run's row of `make status`."""
    command = [sys.executable, "-m", "dayzero.status", "--experiment", "tiny", "--once", "--json"]
    done = subprocess.run(command, cwd=site.path, env=site.environment, text=True, capture_output=True, check=True)
    return next(row for row in map(json.loads, done.stdout.splitlines()) if row["run"] == run)


def outcomes(site: Site, run: str) -> list[str]:
    return [a.get("outcome", "training") for a in read_json(site.folder(run) / "summary.json")["attempts"]]


def go_on(ranks: list) -> None:  # type: ignore[type-arg]
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):  # SLURM wakes what it ends
            rank.send_signal(signal.SIGCONT)


def restarts(site: Site, job: str) -> int:
    """How often SLURM has put the job back into the queue."""
    return parse_job(site.cluster.call("scontrol", "show", "job", "-o", job)).restarts


@pytest.fixture(scope="module")
def site(site: Site, accounted: Cluster) -> Site:
    return replace(site, cluster=accounted, status_command="sacct")


@pytest.fixture(scope="module")
def curve(site: Site) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of the undisturbed run on this machine, without SLURM."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2"]
    done = subprocess.run(
        [*command, site.summary_file("reference")], cwd=site.path, env=site.environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return site.curve("reference")


@pytest.fixture
def small_disk(site: Site) -> Iterator[Path]:
    """A file system of 20 MiB, on which the run `filled` trains."""
    with mounted(site.folder("filled"), "20m") as disk:
        yield disk


def test_the_time_limit_stops_with_a_checkpoint_and_the_job_goes_on(site: Site, curve: list) -> None:  # type: ignore[type-arg]
    process = site.start(site.summary_file("limited"))
    site.hold("limited", 7)
    job = site.job_of("limited")
    row = status(site, "limited")
    assert (row["stage"], row["job_id"], row["node"], row["state"]) == ("train", job, "node[1-2]", "running")
    assert (row["step"], row["total"]) == (7, 24)
    # SLURM looks every 30 s and signals 60 s (stop_before) before the end as of its next look: at its next one.
    # With the signal it wakes (SIGCONT) what was stopped, so the ranks do at most a step or two and leave.
    site.cluster.call("scontrol", "update", f"JobId={job}", "EndTime=now+90seconds")
    site.wait(lambda: restarts(site, job) == 1, "the job back in the queue", 120)
    site.cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    code, printed = site.finish(process)
    assert code == 0, printed + site.job_logs()
    assert outcomes(site, "limited") == ["stopped", "training"]
    first, second = read_json(site.folder("limited") / "summary.json")["attempts"]
    assert first["to_step"] == second["from_step"]
    assert 7 <= second["from_step"] < 24  # the ranks are woken a moment before they are signalled
    assert site.curve("limited") == curve


def test_a_preempted_job_goes_on(site: Site, curve: list) -> None:  # type: ignore[type-arg]
    """A job of a partition that goes first takes its GPUs: it is signalled, has a grace time, and is put back."""
    process = site.start(site.summary_file("preempted"))
    site.hold("preempted", 9)
    job = site.job_of("preempted")
    urgent = ("--partition=urgent", "--nodes=2", "--gres=gpu:2", "--mem=100", "--output=/dev/null", "--wrap=sleep 3")
    site.cluster.call("sbatch", *urgent)
    site.wait(lambda: restarts(site, job) >= 1, "the job back in the queue", 120)
    code, printed = site.finish(process)
    assert code == 0, printed + site.job_logs()
    assert outcomes(site, "preempted") == ["stopped", "training"]
    assert read_json(site.folder("preempted") / "summary.json")["attempts"][1]["from_step"] >= 9
    assert site.curve("preempted") == curve


def test_a_lost_node(site: Site, curve: list) -> None:  # type: ignore[type-arg]
    """Its job goes back into the queue by itself and continues when the node is there again."""
    process = site.start(site.summary_file("lost"))
    site.hold("lost", 12)
    job = site.job_of("lost")
    site.cluster.kill_node("node2")
    # what SLURM does by itself after SlurmdTimeout
    site.cluster.call("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=no answer")
    site.wait(lambda: restarts(site, job) == 1, "the job back in the queue", 120)
    site.cluster.start_node("node2")
    code, printed = site.finish(process)
    assert code == 0, printed + site.job_logs()
    first, second = read_json(site.folder("lost") / "summary.json")["attempts"]
    assert first["job_id"] == second["job_id"] == job
    assert second["requeues"] == 1
    assert second["from_step"] in (5, 10)  # the newest that was complete
    assert site.curve("lost") == curve


def test_a_stopped_task_of_an_array_goes_on_alone(site: Site, curve: list) -> None:  # type: ignore[type-arg]
    """Two runs are the tasks of one array."""
    summaries = [site.summary_file("first"), site.summary_file("second")]
    process = site.start("--slurm-array-jobs", "train", "--slurm-array-limit", "30", *summaries)
    ranks = site.hold("second", 7)
    job = site.job_of("second")
    lines = site.cluster.call(
        "scontrol", "show", "job", "-o", job
    ).splitlines()  # the last task's id is the array's too
    (task,) = [parse_job(line).array_task for line in lines if line.startswith(f"JobId={job} ")]
    assert status(site, "second")["job_id"] == task
    site.cluster.call("scancel", "--signal=USR1", task)
    go_on(ranks)
    code, printed = site.finish(process)
    assert code == 0, printed + site.job_logs()
    assert outcomes(site, "first") == ["training"]
    assert outcomes(site, "second") == ["stopped", "training"]
    first, second = (read_json(site.folder(run) / "summary.json")["attempts"][-1] for run in ("first", "second"))
    assert (first["requeues"], second["requeues"]) == (0, 1)
    assert first["job_id"] != second["job_id"] == task
    assert site.curve("first") == site.curve("second") == curve


def test_a_full_disk(site: Site, curve: list, small_disk: Path) -> None:  # type: ignore[type-arg]
    """The next checkpoint cannot be written: one line says so, and with room again training goes on from the last."""
    process = site.start("--retries", "0", site.summary_file("filled"))
    ranks = site.hold("filled", 7)
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(b"\0" * 4096)
    go_on(ranks)
    code, printed = site.finish(process)
    assert code != 0, printed
    assert "no space left on the disk of" in " ".join(printed.split()), printed
    filler.unlink()
    site.run(site.summary_file("filled"))
    assert read_json(small_disk / "summary.json")["attempts"][-1]["from_step"] == 5
    assert site.curve("filled") == curve


def test_signals_in_the_last_moment_end_nothing(site: Site, curve: list) -> None:  # type: ignore[type-arg]
    """When all is done, and while Python ends: the job would fail, or go back into the queue without its results."""
    process = site.start("--retries", "0", site.summary_file("ended"))
    lock = site.folder("ended") / "lock.json"
    site.wait((site.folder("ended") / "checkpoints/step_24").exists, "the last checkpoint")
    job = site.job_of("ended")

    def over() -> bool:
        site.cluster.call("scancel", "--signal=USR1", job, check=False)
        return not lock.exists()

    site.wait(over, "the training's end", 120)
    code, printed = site.finish(process)
    assert code == 0, printed + site.job_logs()
    assert restarts(site, job) == 0
    assert outcomes(site, "ended") == ["training"]
    assert site.curve("ended") == curve


def test_a_cancelled_job_and_a_rerun(site: Site, curve: list) -> None:  # type: ignore[type-arg]
    process = site.start("--retries", "0", site.summary_file("cancelled"))
    ranks = site.hold("cancelled", 8)
    site.cluster.call("scancel", site.job_of("cancelled"))
    go_on(ranks)
    code, printed = site.finish(process)
    assert code != 0, printed
    site.wait(lambda: not site.ranks("cancelled"), "no rank left", 120)
    site.run(site.summary_file("cancelled"))
    assert outcomes(site, "cancelled")[-1] == "training"
    assert len(outcomes(site, "cancelled")) == 2
    assert site.curve("cancelled") == curve


def test_a_dead_snakemake_and_a_second_one_beside_its_job(site: Site, curve: list) -> None:  # type: ignore[type-arg]
    """The job lives on; a second training of the run is refused, naming the first; the first ends well."""
    process = site.start(site.summary_file("orphaned"))
    ranks = site.hold("orphaned", 6)
    job = site.job_of("orphaned")
    process.send_signal(signal.SIGKILL)
    process.wait()
    command = [sys.executable, "-m", "snakemake", "--unlock"]
    subprocess.run(command, cwd=site.path, env=site.environment, check=True, capture_output=True)
    code, printed = site.finish(site.start("--retries", "0", site.summary_file("orphaned")))
    assert code != 0, printed
    log = (site.folder("orphaned").parent / "logs/train.log").read_text()
    assert f"is being trained by SLURM job {job} on node[1-2], process " in log
    assert all(rank.is_running() for rank in ranks)
    go_on(ranks)
    site.wait(lambda: site.cluster.jobs()[job] == "COMPLETED", "the first job's end", 300)
    assert site.curve("orphaned") == curve
    log = (site.folder("orphaned").parent / f"logs/train-{job}-0.log").read_text()
    assert "processes on each of 2 nodes" in log
    assert "train 24/24" in log
    os.sync()
    assert "Nothing to be done" in site.run(site.summary_file("orphaned"))
