"""The Kubernetes profile, with the real Snakemake and its real executor; the cluster and the stages are stand-ins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dayzero.kubernetes import KubernetesError, job_manifest, job_status, main

from tests.workflow.project import ROOT, STAND_IN, TINY, Project, make_project

pytestmark = pytest.mark.workflow
KUBECTL = Path(__file__).parent / "kubectl_stand_in"
THREADS = (os.cpu_count() or 1) + 1
"""More than this machine has."""
GPU = f"  resources: {{train: {{gpu: 2, threads: {THREADS}, mem_mb: 5000, runtime: 90}}}}\nruns:"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project on a volume that is mounted at the test's folder."""
    project = make_project(tmp_path / "volume/project", TINY.replace("runs:", GPU))
    profile = project.path / "profiles/kubernetes/config.yaml"
    text = profile.read_text()
    for old, new in (
        ("--mount /work", f"--mount {tmp_path}/volume"),
        ("checks: 20", "checks: 1"),
        ("latency-wait: 60", "latency-wait: 5"),
    ):
        assert old in text
        text = text.replace(old, new)
    profile.write_text(text.replace("retries: 2", "retries: 0"))
    (tmp_path / "jobs").mkdir()
    return project


def start(project: Project, **more: str) -> subprocess.Popen[str]:
    jobs = project.path.parents[1] / "jobs"
    environment = {
        **os.environ,
        "PATH": f"{KUBECTL}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{STAND_IN}{os.pathsep}{ROOT / 'workflow'}",
        "KUBECTL_STAND_IN": str(jobs),
        **more,
    }
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/kubernetes"]
    return subprocess.Popen(
        command, cwd=project.path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def manifests(project: Project) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in (project.path.parents[1] / "jobs").glob("*/manifest.json")]


def test_a_sweep_of_which_one_run_fails(project: Project) -> None:
    process = start(project, STAND_IN_FAILS="results/tiny/low/train")
    printed, _ = process.communicate(timeout=400)
    assert process.returncode != 0
    results = project.path / "results/tiny"
    assert (results / "high/eval/results.json").exists(), printed
    assert not (results / "low/train/summary.json").exists()
    assert "made to fail" in printed
    pods = [job["spec"]["template"]["spec"]["containers"][0] for job in manifests(project)]
    trainings = [pod["resources"] for pod in pods if "nvidia.com/gpu" in pod["resources"]["limits"]]
    asked = {"cpu": THREADS, "memory": "5000M", "nvidia.com/gpu": 2}
    assert trainings == [{"requests": asked, "limits": {"memory": "5000M", "nvidia.com/gpu": 2}}] * 2
    assert {job["spec"]["activeDeadlineSeconds"] for job in manifests(project)} >= {90 * 60}
    assert {pod["workingDir"] for pod in pods} == {str(project.path)}


def test_jobs_are_ended_as_snakemake_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is interrupted: the command of the profile with the names of the jobs."""
    monkeypatch.setenv("PATH", f"{KUBECTL}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("KUBECTL_STAND_IN", str(tmp_path / "jobs"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "script.sh").write_text("sleep 600\n")
    asked = ["--cpus", "1", "--memory-mb", "100", "--minutes", "10", "--gpus", "0", "--mount", str(tmp_path)]
    names = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "dayzero.kubernetes", "submit", "--image", "i", "--claim", "c", *asked, "script.sh"],
            env={**os.environ, "PYTHONPATH": str(ROOT / "workflow")}, text=True, capture_output=True, check=True,
        )  # fmt: skip
        names.append(done.stdout.strip())
    assert len({*names}) == 2
    subprocess.run([ROOT / "profiles/kubernetes/cancel", *names], check=True)
    assert all((job / "deleted").exists() for job in (tmp_path / "jobs").iterdir())


def test_what_the_cluster_refuses_is_said_in_one_line(project: Project) -> None:
    profile = project.path / "profiles/kubernetes/config.yaml"
    profile.write_text(profile.read_text().replace("--image python:3.11", "--image forbidden"))
    process = start(project)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "error: Error from server (Forbidden): jobs.batch is forbidden: no such image" in printed.splitlines()
    assert "Traceback" not in printed


def test_a_folder_that_pods_cannot_see(tmp_path: Path) -> None:
    with pytest.raises(KubernetesError, match="is not below it, so pods would not see it"):
        job_manifest(
            Path("script.sh"),
            image="i",
            claim="c",
            mount=tmp_path / "elsewhere",
            cpus=1,
            memory_mb=1,
            minutes=1,
            gpus=0,
        )


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ({}, "running"),
        ({"active": 1, "conditions": None}, "running"),
        ({"conditions": [{"type": "Suspended", "status": "False"}, {"type": "Complete", "status": "True"}]}, "success"),
        ({"conditions": [{"type": "FailureTarget", "status": "True"}, {"type": "Failed", "status": "True"}]}, "failed"),
    ],
)
def test_states_of_jobs(status: dict[str, Any], says: str) -> None:
    assert job_status({"status": status}) == says


def test_without_kubectl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["status", "job.batch/x"]) == 1
    assert capsys.readouterr().err == "error: kubectl is not on PATH: install it, with a context of the cluster\n"
