"""`make status` from files and the queue's text alone, and the table of failures from Snakemake's log alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from dayzero import status
from dayzero.attempts import Attempts
from dayzero.config import RunConfig
from dayzero.failures import failures, print_failures
from dayzero.provenance import scheduler_job
from dayzero.reporting.collect import read_run
from dayzero.reporting.jobs import jobs_table
from dayzero.reporting.scores import DASH
from dayzero.run_lock import LOCK, RunLock, read_lock
from dayzero.slurm import Job
from dayzero.status import Queued, duration, main, parse_queue, run_status, shared_jobs

from tests.unit.report_files import run_config, write_run


def run_of(**values: object) -> RunConfig:
    base = {"experiment": "e", "run": "a", "model": {"source": "m"}, "data": {"source": "d"}}
    return RunConfig.model_validate({**base, "train": {"max_steps": 40}, "evaluate": {"tasks": ["x"]}, **values})


def step(n: int, **more: float) -> dict[str, float]:
    return {"step": n, "epoch": n / 10, "loss": 1 / n, "step_seconds": 1.5, "data_seconds": 0.5,
            "tokens_per_second": 100.0, "time": time.time(), **more}  # fmt: skip


def live(folder: Path, *records: dict[str, float], name: str = "checkpoints/metrics.jsonl") -> None:
    file = folder / "train" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": half a li')


QUEUE = """\
12|RUNNING|node[1-2]|{here}|rule_train_wildcards_a@five|None
13|PENDING||{here}|rule_verify_serving_wildcards_b@five|Priority
14|RUNNING|node7|/elsewhere|rule_train_wildcards_b@five|None
15|RUNNING|node7|{here}|(null)|None
16_2|RUNNING|node7|{here}|rule_export_wildcards_a@five|None
17|RUNNING|node8|{here}|rule_evaluate_wildcards_b@other|None
18|RUNNING|node8|{here}|rule_tokenize_wildcards_rows-m-3@other|None
"""


def test_the_queue_s_jobs_of_this_folder_and_experiment(tmp_path: Path) -> None:
    assert parse_queue(QUEUE.format(here=tmp_path), tmp_path, "five") == {
        ("train", "a"): Queued("12", "RUNNING", "node[1-2]", "None"),
        ("tokenize", "rows-m-3"): Queued("18", "RUNNING", "node8", "None"),
        ("verify_serving", "b"): Queued("13", "PENDING", "", "Priority"),
    }


def test_a_run_in_training(tmp_path: Path) -> None:
    live(tmp_path, *(step(n) for n in range(1, 31)))
    row = run_status(run_of(), tmp_path, {("train", "a"): Queued("12", "RUNNING", "node[1-2]", "None")})
    assert (row.stage, row.step, row.total, row.job_id, row.node) == ("train", 30, 40, "12", "node[1-2]")
    assert (row.seconds_left, row.tokens_per_second, row.state) == (20.0, 100.0, "running")
    assert row.loss == pytest.approx(1 / 30)


def test_epochs_give_the_number_of_steps(tmp_path: Path) -> None:
    live(tmp_path, step(5))
    assert run_status(run_of(train={"num_epochs": 4.0}), tmp_path, {}).total == 40


def test_training_without_slurm_is_seen_by_its_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path / "train", job=None):
        row = run_status(run_of(), tmp_path, {})
        assert (row.stage, row.state, row.step, row.total) == ("train", "training", None, 40)
        assert row.node


def test_a_task_of_an_array_is_shown_by_its_own_name(tmp_path: Path) -> None:
    with RunLock(tmp_path / "train", job=Job(job_id="2", array_task="2_8", nodes="node1")):
        assert run_status(run_of(), tmp_path, {}).job_id == "2_8"


@pytest.mark.parametrize("outcome", ["failed", "stopped", None])
def test_a_training_that_nobody_continues_says_how_it_ended(tmp_path: Path, outcome: str | None) -> None:
    live(tmp_path, step(5))
    assert run_status(run_of(), tmp_path, {}).state == ""
    record = Attempts(tmp_path / "train")
    record.begin(None, 0, "n1")
    if outcome:
        record.end(outcome, 5)
    row = run_status(run_of(), tmp_path, {})
    assert (row.step, row.seconds_left, row.state) == (5, None, outcome or "lost")
    row = run_status(run_of(), tmp_path, {("train", "a"): Queued("12", "PENDING", "", "Priority")})
    assert (row.seconds_left, row.state) == (70.0, "pending (Priority)")


def test_a_training_without_a_sign_of_life_is_silent_before_its_first_step_too(tmp_path: Path) -> None:
    with RunLock(tmp_path / "train", job=None):
        os.utime(tmp_path / "train" / LOCK, (0, 0))
        assert run_status(run_of(), tmp_path, {}).state == "training, silent"


def test_a_training_that_ends_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live(tmp_path, step(5))
    with RunLock(tmp_path / "train", job=None):

        def ends_now(folder: Path) -> dict[str, object] | None:
            lock = read_lock(folder)
            (folder / LOCK).unlink(missing_ok=True)
            return lock

        monkeypatch.setattr(status, "read_lock", ends_now)
        assert run_status(run_of(), tmp_path, {}).state == "training"
        assert run_status(run_of(), tmp_path, {}).state == ""


def test_what_a_run_waits_for_in_the_store(tmp_path: Path) -> None:
    needs = [tmp_path / "store" / name for name in ("data/rows-1", "models/m-2", "tokens/rows-m-3")]
    jobs = {("tokenize", "rows-m-3"): Queued("12", "PENDING", "", "Resources")}
    row = run_status(run_of(), tmp_path / "a", {}, needs)
    assert (row.stage, row.state, row.job_id) == ("fetch_data", "", "")
    row = run_status(run_of(), tmp_path / "a", jobs, needs)
    assert (row.stage, row.state, row.job_id) == ("tokenize", "pending (Resources)", "12")
    for path in needs:
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
    assert run_status(run_of(), tmp_path / "a", {}, needs).stage == "train"
    assert run_status(run_of(), tmp_path / "a", {("train", "a"): jobs["tokenize", "rows-m-3"]}, needs).job_id == "12"


def test_jobs_of_several_runs(tmp_path: Path) -> None:
    """An array that waits and a group: of which runs squeue does not tell."""
    lines = (
        "16_[1-8]|PENDING||{here}|rule_train_wildcards_a@five|Priority\n17|RUNNING|node7|{here}|rule_small@five|None\n"
    )
    lines += "18|RUNNING|node7|{here}|rule_small@other|None\n"
    text = lines.format(here=tmp_path)
    assert parse_queue(text, tmp_path, "five") == {}
    assert shared_jobs(text, tmp_path, "five") == ["16_[1-8] (train) pending (Priority)", "17 (small) running"]


def test_the_stages_one_after_the_other(tmp_path: Path) -> None:
    waiting = {("evaluate", "a"): Queued("9", "PENDING", "", "Resources")}
    assert run_status(run_of(), tmp_path, {}).stage == "train"
    assert run_status(run_of(method={"name": "none"}), tmp_path, {}).stage == "export"
    for stage, file in (("export", "train/summary.json"), ("evaluate", "model/manifest.json")):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
        assert run_status(run_of(), tmp_path, {}).stage == stage
    row = run_status(run_of(), tmp_path, waiting)
    assert (row.stage, row.state, row.job_id) == ("evaluate", "pending (Resources)", "9")
    for file in ("eval/results.json", "serve/parity.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("{}")
    live(tmp_path, step(40), name="metrics.jsonl")
    done = run_status(run_of(), tmp_path, {})
    assert (done.stage, done.step, done.loss, done.seconds_left) == ("done", 40, 0.025, None)


def test_the_command_for_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "defaults: {model.source: m, data.source: d, train.max_steps: 3}\nruns: {first: {}, second: {}}\n"
    (tmp_path / "e.yaml").write_text(text)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text("experiment: demo\nresults_dir: results\n")
    assert main(["--experiment", "e.yaml", "--once"]) == 0
    assert "first" in (printed := capsys.readouterr().out)
    assert "second" in printed
    assert main(["--experiment", "e.yaml", "--once", "--json"]) == 0
    assert [json.loads(line)["run"] for line in capsys.readouterr().out.splitlines()] == ["first", "second"]
    command = [sys.executable, "-m", "dayzero.status", "--experiment", "e.yaml", "--once", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()  # as `head` does when it has enough
        assert "Error" not in process.stderr.read()
    lock = tmp_path / "results/e/first/train" / LOCK
    lock.parent.mkdir(parents=True)
    lock.write_text("{")
    assert main(["--experiment", "e.yaml", "--once", "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["stage"] == "?"
    assert "lock.json is spoilt: delete it" in first["state"]
    assert second["stage"] == "fetch_data"
    assert main(["--experiment", "none.yaml", "--once"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_queue_that_does_not_answer_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the table would look as if no job were there; without SLURM there is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.yaml").write_text("defaults: {model.source: m, data.source: d, train.max_steps: 3}\nruns: {a: {}}\n")
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text("experiment: demo\nresults_dir: results\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["--experiment", "e.yaml", "--once"]
    assert main(command) == 0
    assert "squeue" not in "".join(capsys.readouterr())
    (tmp_path / "squeue").write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1"
    )
    (tmp_path / "squeue").chmod(0o755)
    says = "the queue is not known: squeue: slurm_load_jobs error: Unable to contact slurm controller"
    assert main(command) == 0
    assert says in " ".join(capsys.readouterr().out.split())
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    assert says in printed.err
    assert json.loads(printed.out)["run"] == "a"


def test_gpu_hours_count_from_the_job_s_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the record of a training's starts and each stage's JSON alike: Snakemake's start in the job is paid for."""
    began = time.time() - 3600
    job = Job(job_id="5", gpus=4, started=f"{datetime.fromtimestamp(began):%Y-%m-%dT%H:%M:%S}")
    monkeypatch.setattr("dayzero.slurm.current_job", lambda: job)
    monkeypatch.setattr("dayzero.slurm.energy_joules", lambda _: None)
    made = scheduler_job(60.0)
    assert made
    Attempts(tmp_path).begin(job, 0, "node1")
    (attempt,) = Attempts(tmp_path).all()
    assert made["gpu_hours"] == pytest.approx(4.0, abs=0.01)
    assert attempt["gpu_hours"] == pytest.approx(4.0, abs=0.01)
    assert attempt["seconds"] < 10
    unknown = replace(job, started="")
    monkeypatch.setattr("dayzero.slurm.current_job", lambda: unknown)
    assert (scheduler_job(900.0) or {})["gpu_hours"] == pytest.approx(1.0)


def test_durations() -> None:
    assert [duration(s) for s in (5, 3725, 90000)] == ["0:00:05", "1:02:05", "1d 1:00:00"]


LOG = """\
Select jobs to execute...
Error in rule train:
    message: None
    jobid: 8
    output: results/e/low/train/metrics.jsonl
    log: {logs}/low/logs/train.log (check log file(s) for error details)
    external_jobid: 31
[Sun]
Error in rule train:
    message: None
    jobid: 9
    log: {logs}/high/logs/train.log (check log file(s) for error details)
    external_jobid: 32
Error in rule tokenize:
    jobid: 4
    log: {logs}/store/logs/tokenize-rows-85.log (check log file(s) for error details)
[Sun]
Finished jobid: 9 (Rule: train)
SLURM-job '31' failed, SLURM status is: 'OUT_OF_MEMORY'. Detailed failure reason unavailable.
"""


def test_failures_that_stayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {
        "low/logs/train.log": "2026-11-22 10:00:00,123 INFO a\n2026-11-22 10:00:01,000 ERROR error: rank 1: no\nTr\n",
        "store/logs/tokenize-rows-85.log": "Traceback\nKilled\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    log = tmp_path / "snakemake.log"
    log.write_text(LOG.format(logs=tmp_path))
    train, tokenize = failures(log)
    assert (train.run, train.stage, train.job_id, train.reason) == ("low", "train", "31", "out_of_memory")
    assert train.last_line == "rank 1: no"
    assert (tokenize.run, tokenize.stage, tokenize.job_id, tokenize.last_line) == ("rows-85", "tokenize", "-", "Killed")
    print_failures(str(log))
    printed = capsys.readouterr().err
    assert "2 failed" in printed
    assert "rank 1: no" in printed
    print_failures(str(tmp_path / "none.log"))
    assert capsys.readouterr().err.startswith("no table of failures")


GROUP_LOG = """\
Job afc2c101-fb49-545f-a30a-bb4ffcf71be4 has been submitted with SLURM jobid 34 (log: /p/group_small_train/34.log).
Job 8a68506c-2dbb-524e-b673-522ddeea94ed has been submitted with SLURM jobid 35 (log: /p/group_small_train/35.log).
[Fri Nov 27 19:31:29 2026]
    message: Error in group small
    log: /p/.snakemake/slurm_logs/group_small_train/34.log (check log file(s) for error details)
    jobs:
        rule train:
            jobid: 9
            output: {sweep}/s0/train/metrics.jsonl, {sweep}/s0/train/summary.json
            log: {sweep}/s0/logs/train.log (check log file(s) for error details)
        rule train:
            jobid: 10
            output: {sweep}/s1/train/metrics.jsonl, {sweep}/s1/train/summary.json
            log: {sweep}/s1/logs/train.log (check log file(s) for error details)
    [Fri Nov 27 19:31:29 2026]
    Error in rule train:
        message: None
        jobid: 9
        input: res4/store/tokens/rows-0c4df6b031/manifest.json, res4/store/models/llama-5fe36d7e4a/manifest.json
        output: {sweep}/s0/train/metrics.jsonl, {sweep}/s0/train/summary.json
        log: {sweep}/s0/logs/train.log (check log file(s) for error details)
        shell:
            python -m dayzero.stages.train --output {sweep}/s0/train --log {sweep}/s0/logs/train.log
            (command exited with non-zero exit code)
    [Fri Nov 27 19:31:29 2026]
    Error in rule train:
        message: None
        jobid: 10
        output: {sweep}/s1/train/metrics.jsonl, {sweep}/s1/train/summary.json
        log: {sweep}/s1/logs/train.log (check log file(s) for error details)
        shell:
            python -m dayzero.stages.train --output {sweep}/s1/train --log {sweep}/s1/logs/train.log
            (command exited with non-zero exit code)
[Fri Nov 27 19:31:41 2026]
Finished jobid: 11 (Rule: train)
[Fri Nov 27 19:31:41 2026]
Finished jobid: 12 (Rule: train)
2 of 23 steps (9%) done
"""


def test_the_failed_runs_of_a_group(tmp_path: Path) -> None:
    """As Snakemake 9.27 writes them; a run whose results were kept had finished, as had one that a second try made."""
    for run, said in (("s0", "stopped"), ("s1", "error: method.lora.targets 'nosuch' match no module")):
        (tmp_path / run / "logs").mkdir(parents=True)
        (tmp_path / run / "logs/train.log").write_text(f"2026-11-27 19:31:24,000 ERROR {said}\n")
    log = tmp_path / "snakemake.log"
    log.write_text(GROUP_LOG.format(sweep=tmp_path))
    s0, s1 = failures(log)
    assert (s0.run, s0.stage, s0.job_id, s0.reason, s0.last_line) == ("s0", "train", "34", "failed", "stopped")
    assert (s1.run, s1.job_id) == ("s1", "34")
    assert s1.last_line == "method.lora.targets 'nosuch' match no module"
    (tmp_path / "s0/train").mkdir()
    for name in ("metrics.jsonl", "summary.json"):
        (tmp_path / "s0/train" / name).touch()
    assert failures(log) == [s1]
    log.write_text(GROUP_LOG.format(sweep=tmp_path) + "\nFinished jobid: 10 (Rule: train)\n")
    assert failures(log) == []


def test_a_group_that_could_not_be_submitted(tmp_path: Path) -> None:
    said = """\
Failed group small: SLURM sbatch failed. The error message was 'sbatch: error: Memory specification can not be satisfied
sbatch: error: Batch job submission failed: Requested node configuration is not available'.
    sbatch call:
        sbatch --parsable
"""
    submitted, marker, after = GROUP_LOG.partition("[Fri Nov 27 19:31:41 2026]")
    failed = submitted.replace(
        "    log: /p/.snakemake/slurm_logs/group_small_train/34.log (check log file(s) for error details)\n", ""
    )
    log = tmp_path / "snakemake.log"
    log.write_text((failed + said + marker + after).format(sweep=tmp_path))
    for failure, run in zip(failures(log), ("s0", "s1"), strict=True):
        assert (failure.run, failure.job_id, failure.reason) == (run, "-", "not submitted")
        assert failure.last_line == (
            "Memory specification can not be satisfied; Batch job submission failed: "
            "Requested node configuration is not available"
        )


def test_the_report_shows_every_start_of_a_training(tmp_path: Path) -> None:
    folder = write_run(tmp_path, run_config("e", "a", "lora"), None)
    assert jobs_table([read_run(folder)]) is None
    file = folder / "train/summary.json"
    summary = json.loads(file.read_text())
    job = {"job_id": "5", "nodes": "node[1-2]", "gpus": 8, "requeues": 1, "gpu_hours": 0.5, "energy_joules": 7200000}
    first = {**job, "started": 1.7e9, "seconds": 225.0, "outcome": "stopped", "requeues": 0}
    last = {key: value for key, value in job.items() if key != "energy_joules"}  # shorter than a reading of energy
    summary["attempts"] = [first, {**last, "started": 1.7e9 + 900, "seconds": 60.0}]
    summary["provenance"]["slurm"] = job
    file.write_text(json.dumps(summary))
    export = folder / "model/manifest.json"
    manifest = json.loads(export.read_text())
    manifest["provenance"]["slurm"] = {"job_id": "6", "nodes": "node1", "gpus": 0, "requeues": 0, "gpu_hours": 0.0}
    export.write_text(json.dumps(manifest))
    table = jobs_table([read_run(folder)])
    assert table
    assert [row[:5] + row[7:] for row in table.rows] == [
        ["a", "train", "5", "node[1-2]", "8", "0.50", "0", "2.00 kWh", "stopped"],
        ["a", "train", "5", "node[1-2]", "8", "0.50", "1", "2.00 kWh", "finished"],
        ["a", "export", "6", "node1", "0", "0.00", "0", DASH, "finished"],
    ]
