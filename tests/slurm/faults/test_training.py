"""Training on a real SLURM cluster of two virtual nodes, through what SLURM does to it.

The runs that meet a fault are equal but for their names, so each must end with the very curve of `reference`, which
nothing disturbed and which ran without SLURM, on the local profile. The cluster keeps accounts, as most sites do, so
Snakemake learns from sacct how its jobs ended; on the cluster of the other tests, which keeps none, from squeue.
"""

from __future__ import annotations

import pytest
from dayzero.files import read_json
from dayzero.slurm import parse_job

from tests.slurm.conftest import Site
from tests.slurm.faults.asked import go_on, outcomes, restarts, status

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


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
