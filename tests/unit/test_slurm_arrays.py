"""Job arrays: which job a task's process becomes, and what an array cannot do."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from dayzero import slurm
from dayzero.config import RunConfig
from dayzero.errors import ConfigError
from dayzero.experiment import Experiment
from dayzero.slurm_arrays import LONGEST, array_problems, task_command
from dayzero.snakemake_resources import Site
from dayzero.wiring import Wiring

COMMANDS = {"2": "python -m snakemake b", "3": "python -m snakemake c"}
PAYLOAD = base64.b64encode(json.dumps({k: zlib.compress(v.encode()).hex() for k, v in COMMANDS.items()}).encode())
ARGV = ["snakemake", "--executor", "slurm-jobstep", f"--slurm-jobstep-array-execs={PAYLOAD.decode()}"]
SITE = Site(gpu_request="gres")
ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_MIN": "1"}


@pytest.mark.parametrize(
    ("argv", "environment", "command"),
    [
        (ARGV, {**ARRAY, "SLURM_ARRAY_TASK_ID": "2"}, COMMANDS["2"]),
        (ARGV, {**ARRAY, "SLURM_ARRAY_TASK_ID": "3"}, COMMANDS["3"]),
        (ARGV, {**ARRAY, "SLURM_ARRAY_TASK_ID": "1"}, None),  # the first job is this Snakemake's own
        (ARGV, {**ARRAY, "SLURM_ARRAY_TASK_ID": "3", "DAYZERO_ARRAY_TASK": "7_2"}, COMMANDS["3"]),
        (ARGV[:3], {**ARRAY, "SLURM_ARRAY_TASK_ID": "3", "DAYZERO_ARRAY_TASK": "7_3"}, None),  # it became its own
        (ARGV, {}, None),
        (["snakemake", "--cores", "2"], {**ARRAY, "SLURM_ARRAY_TASK_ID": "2"}, None),  # a person's own array
    ],
)
def test_whose_process_a_task_becomes(argv: list[str], environment: dict[str, str], command: str | None) -> None:
    assert task_command(argv, environment) == command


def test_a_task_without_its_command_does_not_run_the_first_job() -> None:
    with pytest.raises(ConfigError, match="task 2 of the array was not told its job: lower --slurm-array-limit"):
        task_command(ARGV[:3], {**ARRAY, "SLURM_ARRAY_TASK_ID": "2"})


def problems(
    asked: str,
    site: Site = SITE,
    limit: int = LONGEST,
    at_once: int | None = None,
    seq_len: int | None = None,
    **train: object,
) -> list[str]:
    base = {"experiment": "e", "train": {"max_steps": 1}, "data": {"source": "r.jsonl"}, "model": {"source": "hf:o/m"}}
    runs = {name: RunConfig.model_validate({**base, "run": name}) for name in ("a", "b")}
    own = {"resources": {"train": train}, **({"tokenize": {"seq_len": seq_len}} if seq_len else {})}
    runs["b"] = RunConfig.model_validate({**base, "run": "b", **own})
    settings = SimpleNamespace(array_jobs=asked, array_limit=limit, pass_command_as_script=False)
    return array_problems(Wiring(Experiment("e", "", runs), "results"), site, settings, at_once)


def test_runs_that_ask_for_the_same() -> None:
    assert problems("train", at_once=2) == []
    assert problems("") == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"asked": "train", "mem_mb": 9000}, "runs a and b ask for different resources.train, GPUs or nodes"),
        (
            {"asked": "train", "seq_len": 512},
            "runs a and b wait for different data, tokens or models, so that not all",
        ),
        (
            {"asked": "train", "at_once": 1},
            "2 trainings, of which Snakemake hands over 1 at a time, and the others would",
        ),
        ({"asked": "train, export"}, "slurm-array-jobs export: the jobs of export are ready one by one"),
        ({"asked": "train", "limit": 1000}, "slurm-array-limit 1000: the command line of a longer array does not fit"),
        ({"asked": "train", "site": replace(SITE, small_runs="true")}, "set small_runs to false"),
    ],
)
def test_what_an_array_cannot_do(given: dict[str, object], says: str) -> None:
    (said,) = problems(**given)  # type: ignore[arg-type]
    assert says in said
    assert "\n" not in said


def test_a_task_of_an_array_is_put_back_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last task's own id is the id of the whole array."""
    shown = "".join(
        f"JobId={job} ArrayJobId=9 ArrayTaskId={task} JobState={state} NumNodes=1 TimeLimit=1:00:00\n"
        for job, task, state in (("9", 3, "RUNNING"), ("11", 2, "RUNNING"), ("10", 1, "COMPLETED"))
    )
    (tmp_path / "scontrol").write_text(
        f'#!/bin/sh\n[ "$1" = show ] && printf "%s" "{shown}" || echo "$@" > {tmp_path}/put\n'
    )
    (tmp_path / "squeue").write_text('#!/bin/sh\necho "9_3|9|RUNNING\n9_2|11|PENDING"\n')
    for command in ("scontrol", "squeue"):
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.put_back("9") is None
    assert (tmp_path / "put").read_text() == "requeue 9_3\n"
    assert slurm.put_back("10") == "it is COMPLETED"
    assert slurm.job_states(["9_2", "11", "9"]) == {"9_2": "PENDING", "11": "PENDING", "9": "RUNNING"}
