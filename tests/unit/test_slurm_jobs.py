"""What is read from SLURM's commands about a job."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from dayzero import slurm
from dayzero.slurm import Job, parse_job, parse_time

SHOWN = (
    "JobId=7 JobName=x UserId=me(1) Account=(null) QOS=(null) JobState=RUNNING Reason=None Requeue=1 Restarts=2 "
    "TimeLimit=1-02:03:04 StartTime=2026-11-22T21:54:53 Partition=gpu NodeList=node[1-2] BatchHost=node1 NumNodes=2 "
    "NumCPUs=8 NumTasks=4 "
)


def test_a_job_as_slurm_shows_it() -> None:
    job = parse_job(SHOWN + "TRES=cpu=8,mem=20000M,node=2,billing=8 TresPerNode=gres:gpu:a100:4")
    assert (job.job_id, job.state, job.nodes, job.num_nodes, job.cpus) == ("7", "RUNNING", "node[1-2]", 2, 8)
    assert (job.account, job.partition, job.restarts, job.gpus) == ("", "gpu", 2, 8)
    assert job.time_limit == 93784


@pytest.mark.parametrize(
    ("tres", "gpus"),
    [
        ("TRES=cpu=8 TresPerNode=gres:gpu:2", 4),
        ("TRES=cpu=8 TresPerNode=gres/gpu:2", 4),
        ("TRES=cpu=8,gres/gpu=6 TresPerNode=gres:gpu:2", 6),
        ("TRES=cpu=8 TresPerJob=gres:gpu:3", 3),
        ("TRES=cpu=8", 0),
    ],
)
def test_gpus_however_they_were_asked_for(tres: str, gpus: int) -> None:
    assert parse_job(SHOWN + tres).gpus == gpus


def test_times() -> None:
    assert [parse_time(t) for t in ("00:01:00", "2-00:00:00", "UNLIMITED", "")] == [60, 172800, None, None]


def test_outside_slurm_there_is_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert slurm.current_job() is None


def test_without_its_commands_a_job_has_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    assert slurm.current_job() == Job(job_id="9", num_nodes=0, ends=None)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1790000000")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    assert slurm.current_job() == Job(job_id="9", num_nodes=4, ends=1.79e9)
    assert slurm.job_states(["9"]) is None
    assert "scontrol does not answer" in str(slurm.put_back("9"))


def test_a_task_of_an_array_is_known_without_slurm_s_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"SLURM_JOB_ID": "2", "SLURM_ARRAY_JOB_ID": "2", "SLURM_ARRAY_TASK_ID": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(tmp_path))
    job = slurm.current_job()
    assert job
    assert job.name == "2_8"
    assert parse_job(SHOWN + "ArrayJobId=2 ArrayTaskId=8").name == "2_8"
    assert parse_job(SHOWN).name == "7"


@pytest.mark.parametrize(
    ("state", "ended", "says"),
    [
        ("COMPLETING", "21:55:10", "it was cancelled"),
        ("COMPLETING", "22:05:01", "its time is up"),
        ("PREEMPTED", "21:55:10", "it is PREEMPTED"),
    ],
)
def test_why_a_job_is_not_put_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str, ended: str, says: str
) -> None:
    """While processes of it live SLURM calls it COMPLETING, whatever ended it."""
    shown = f"JobId=7 JobState={state} TimeLimit=00:10:00 StartTime=2026-11-22T21:55:00 EndTime=2026-11-22T{ended}"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho '{shown}'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.put_back("7") == says


@pytest.mark.parametrize(
    ("train", "interval"),
    [(None, 200), ({"max_steps": 1000}, 200), ({"max_steps": 40}, 80), ({"max_steps": 20}, None),
     ({"num_epochs": 2.0}, 80)],
)  # fmt: skip
def test_a_limit_below_a_checkpoint_interval(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, train: dict[str, float] | None, interval: int | None
) -> None:
    """A run that ends before its first checkpoint is due has no longer interval than itself."""
    import logging

    from dayzero import attempts
    from dayzero.console import log

    metrics = tmp_path / "train/checkpoints/metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    if train:
        (tmp_path / "config.json").write_text(json.dumps({"train": train}))
    log.propagate = True
    try:
        job = Job(job_id="1", time_limit=60)
        with (
            caplog.at_level(logging.WARNING, logger="dayzero"),
            attempts.recorded(tmp_path / "train", job, 100),
        ):
            time.sleep(0.1)
            step = {"step": 1, "epoch": 0.05, "step_seconds": 2.0, "data_seconds": 0.0, "time": time.time() + 1}
            metrics.write_text(f"{json.dumps(step)}\n" * 3)
            time.sleep(1.3)
    finally:
        log.propagate = False
    assert (f"limit of 60 s is shorter than the {interval} s between two checkpoints" in caplog.text) == bool(interval)
    assert bool(caplog.records) == bool(interval)
