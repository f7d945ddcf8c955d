"""What a refused sbatch and a lost node mean, through the real executor; sbatch is a stand-in."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import snakemake_executor_plugin_slurm as plugin
from dayzero import slurm_plugin
from dayzero.failures import failures
from dayzero.slurm_plugin import mend_submission, refusal
from snakemake_interface_executor_plugins.executors.base import SubmittedJobInfo

LIMIT = (
    "sbatch: error: QOSMaxSubmitJobPerUserLimit\n"
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size "
    "and/or time limits)"
)
AWAY = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
WRONG = (
    "sbatch: error: invalid partition specified: gpuu\nsbatch: error: Batch job submission failed: Invalid partition"
)
BUSY = "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying\n"


class Executor(plugin.Executor):  # type: ignore[misc]
    """The real executor without a Snakemake around it; `reported` has what it would tell that one of its jobs."""

    def __init__(self) -> None:
        self.logger, self.lock, self.active_jobs, self.reported = logging.getLogger("test"), threading.Lock(), [], []
        self.workflow = SimpleNamespace(
            executor_settings=SimpleNamespace(
                exclude_failed_nodes="node9", jobname_prefix="", array_jobs="", array_limit=30, logdir=None,
                partition_config=None, status_command="squeue", status_attempts=1, requeue=True, no_requeue=False,
                qos=None, reservation=None, pass_command_as_script=False, disable_memory_fudge=False,
                delete_logfiles_older_than=0, keep_successful_logs=True, efficiency_report=False,
            ),
            workdir_init=Path.cwd(),
        )  # fmt: skip
        self.__post_init__()

    def format_job_exec(self, job: Any) -> str:
        return "true"

    def report_job_submission(self, job_info: SubmittedJobInfo, register_job: bool = True) -> None:
        self.reported.append(str(job_info.external_jobid))

    def report_job_error(self, job_info: SubmittedJobInfo, msg: str | None = None, **_: object) -> None:
        self.reported.append(str(msg))


class Job(SimpleNamespace):
    """One job of a rule."""

    def is_group(self) -> bool:
        return False


def a_job(number: int = 1, **more: object) -> Job:
    resources = type("Resources", (dict,), {"__getattr__": dict.get})(runtime=1, mem_mb=1, slurm_partition="p", **more)
    rule = SimpleNamespace(name="export")
    return Job(name="export", rule=rule, jobid=number, wildcards=[], wildcards_dict={}, resources=resources, threads=1)


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder: sbatch says the lines of `refusal` and fails as often as `times` has lines, then accepts job 7."""
    (tmp_path / "sbatch").write_text(
        f'#!/bin/sh\ncd {tmp_path}\necho $(date +%s.%N) "$@" >> calls\n'
        "[ $(wc -l < calls) -le $(cat times) ] && cat refusal >&2 && exit 1\necho 7\n"
    )
    for name in ("sacct", "sacctmgr", "sshare", "scontrol", "squeue"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm_plugin, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(slurm_plugin, "LONGEST_WAIT", 0.3)
    before = {name: getattr(plugin.Executor, name) for name in ("cancel", "shutdown")}
    mend_submission("five")
    yield tmp_path
    plugin.subprocess = subprocess
    del plugin.Executor._failed_nodes
    for name, method in before.items():
        setattr(plugin.Executor, name, method)


def refuse(folder: Path, said: str, times: int) -> None:
    (folder / "refusal").write_text(said)
    (folder / "times").write_text(str(times))


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("said", [LIMIT, AWAY, BUSY, "sbatch: error: AssocMaxSubmitJobLimit", "x: Socket timed out on"])
def test_a_refusal_that_passes_is_waited_out(sbatch: Path, caplog: pytest.LogCaptureFixture, said: str) -> None:
    refuse(sbatch, said, 2)
    executor = Executor()
    executor.run_job(a_job())
    assert executor.reported == ["7"]
    assert len(calls(sbatch)) == 3
    told = [record.getMessage() for record in caplog.records if record.name == "dayzero"]
    assert len(told) == 2
    assert all(line.startswith(f"sbatch refuses rule_export for now: {refusal(said)}; trying again") for line in told)


def test_a_job_has_its_experiment_in_its_comment(sbatch: Path) -> None:
    """Runs of two experiments have the same names, and are submitted from the same folder."""
    refuse(sbatch, "", 0)
    executor = Executor()
    executor.run_job(a_job())
    executor.run_array_jobs([a_job(1), a_job(2)])
    assert [re.findall(r"--comment (\S+)", call) for call in calls(sbatch)] == [["rule_export@five"]] * 2


def test_an_array_that_is_refused_is_waited_out_too(sbatch: Path) -> None:
    refuse(sbatch, LIMIT, 1)
    executor = Executor()
    executor.run_array_jobs([a_job(1), a_job(2)])
    assert executor.reported == ["7_1", "7_2"]
    assert len(calls(sbatch)) == 2


def test_a_refusal_that_stays_is_told_at_once(sbatch: Path) -> None:
    refuse(sbatch, WRONG, 9)
    executor = Executor()
    executor.run_job(a_job())
    assert len(calls(sbatch)) == 1
    assert "invalid partition specified: gpuu" in executor.reported[0]


def test_the_waits_grow_and_end(
    sbatch: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For all jobs together: those that come later are not waited for as long again."""
    monkeypatch.setattr(slurm_plugin, "PATIENCE", 2.0)
    refuse(sbatch, AWAY, 99)
    executor = Executor()
    executor.run_job(a_job())
    waits = [record.args[-1] for record in caplog.records if record.name == "dayzero" and record.args]
    assert waits[:4] == [0.1, 0.2, 0.3, 0.3]
    assert len(calls(sbatch)) == len(waits) + 1
    time.sleep(0.3)
    executor.run_job(a_job())
    assert len(calls(sbatch)) == len(waits) + 2
    assert len(executor.reported) == 2
    assert all(said.startswith("SLURM sbatch failed") for said in executor.reported)


@pytest.mark.parametrize("ending", ["cancel", "shutdown"])
def test_nothing_is_submitted_once_snakemake_ends(sbatch: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """Two submissions wait, and a third for its turn."""
    monkeypatch.setattr(slurm_plugin, "FIRST_WAIT", 60.0)
    refuse(sbatch, LIMIT, 99)
    executor = Executor()
    executor._job_submission_executor = ThreadPoolExecutor(2)
    for number in range(3):
        executor._job_submission_executor.submit(executor.run_job, a_job(number))
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (not (sbatch / "calls").exists() or len(calls(sbatch)) < 2):
        time.sleep(0.05)
    monkeypatch.setattr(plugin.RemoteExecutor, "shutdown", lambda _: None)
    started = time.monotonic()
    getattr(executor, ending)()
    assert time.monotonic() - started < 10
    assert len(calls(sbatch)) == len(executor.reported) == 2


def test_a_lost_node_excludes_no_other(sbatch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def lost(*_: object) -> tuple[dict[str, str], float]:
        return {"5": "NODE_FAIL"}, 0.0

    class Limiter:
        async def __aenter__(self) -> None: ...
        async def __aexit__(self, *_: object) -> None: ...

    (sbatch / "sacct").write_text("#!/bin/sh\necho 'node[1-64]'\n")
    monkeypatch.setattr(plugin, "query_job_status", lost)
    executor = Executor()
    executor.status_rate_limiter, executor.next_seconds_between_status_checks = Limiter(), 1
    active = [SubmittedJobInfo(a_job(), external_jobid="5", aux={})]

    async def polled() -> list[SubmittedJobInfo]:
        return [job async for job in executor.check_active_jobs(active)]

    assert asyncio.run(polled()) == active  # SLURM puts it back
    refuse(sbatch, "", 0)
    executor.run_job(a_job())
    (call,) = calls(sbatch)
    assert re.findall(r"--exclude=\S+", call) == ["--exclude=node9"]  # the user's own


LOG = """\
[Sun]
Error in rule export:
    message: SLURM sbatch failed. The error message was '{limit}'.
    sbatch call:
        sbatch --parsable --wrap="python --log x"
For further error details see the cluster/cloud log and the log files of the involved rule(s).
    jobid: 10
    log: {logs}/base/logs/export.log (check log file(s) for error details)
    shell:
        python -m dayzero.stages.export
SLURM sbatch failed for array job submission (tasks 1-2). The error message was '{wrong}'.
    sbatch call:
        sbatch --parsable
Error in rule train:
    message: Part of failed array sbatch submission (tasks 1-2); see log for details.For further error details see the
    jobid: 11
    log: {logs}/low/logs/train.log (check log file(s) for error details)
Error in rule train:
    message: Job submission failed with exception: Failed to run sinfo: noFor further error details see the cluster
    jobid: 12
    log: {logs}/high/logs/train.log (check log file(s) for error details)
Error in rule evaluate:
    message: None
    jobid: 13
    log: {logs}/high/logs/evaluate.log (check log file(s) for error details)
"""


def test_a_job_that_was_not_submitted_in_the_table_of_failures(tmp_path: Path) -> None:
    (tmp_path / "base/logs").mkdir(parents=True)
    (tmp_path / "base/logs/export.log").write_text("")  # SLURM's executor makes it
    log = tmp_path / "snakemake.log"
    log.write_text(LOG.format(logs=tmp_path, limit=LIMIT, wrong=WRONG))
    found = [(f.run, f.stage, f.job_id, f.reason, f.last_line) for f in failures(log)]
    assert found[:3] == [
        ("base", "export", "-", "not submitted", refusal(LIMIT)),
        ("low", "train", "-", "not submitted", refusal(WRONG)),
        ("high", "train", "-", "not submitted", "Failed to run sinfo: no"),
    ]
    assert found[3][3] == "failed"
    assert refusal(LIMIT).startswith("QOSMaxSubmitJobPerUserLimit; Batch job submission failed: Job violates")


def test_a_stage_s_log_without_a_line_says_where_to_look(tmp_path: Path) -> None:
    for folder, text in (("a", None), ("b", "\n")):
        log = tmp_path / folder / "logs/train.log"
        log.parent.mkdir(parents=True)
        if text is not None:
            log.write_text(text)
        (tmp_path / "snakemake.log").write_text(f"\nError in rule train:\n    jobid: 1\n    log: {log} (check log\n")
        (found,) = failures(tmp_path / "snakemake.log")
        assert "the job ended before the stage began; its output is in .snakemake/slurm_logs" in found.last_line
