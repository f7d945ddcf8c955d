"""Snakemake's jobs as jobs of a Kubernetes cluster: `python -m dayzero.kubernetes submit ... SCRIPT`, `... status JOB`.

The commands behind `profiles/kubernetes`, for Snakemake's cluster-generic executor. A job is a pod with one container
that runs Snakemake's job script in this very folder: the project and its results lie on a persistent volume, which is
mounted in every pod where it is mounted here. Kubernetes tries a job once; Snakemake's `retries` do the rest, and
training goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SECONDS = 60
"""How long `kubectl` may take."""
GRACE_SECONDS = 120
"""For a checkpoint between the signal to a pod and its end."""
DAY_SECONDS = 86_400


class KubernetesError(ValueError):
    """The cluster did not do as asked; the message is its own last line."""


def job_manifest(
    script: Path,
    *,
    image: str,
    claim: str,
    mount: Path,
    cpus: int,
    memory_mb: int,
    minutes: int,
    gpus: int,
    gpu_resource: str = "nvidia.com/gpu",
) -> dict[str, Any]:
    """The Kubernetes Job (batch/v1) that runs `script` in the current folder.

    Args:
        script: Snakemake's job script.
        image: container image; it needs the C library and the Python that `.venv` was made with.
        claim: PersistentVolumeClaim of the volume that holds the project.
        mount: where that volume is mounted, here and in the pods.
        memory_mb: in 10^6 bytes, as Snakemake counts.
        minutes: after which the cluster ends the job.

    Raises:
        KubernetesError: this folder is not on the volume.
    """
    here = Path.cwd()
    if not here.is_relative_to(mount.resolve()):
        raise KubernetesError(f"--mount {mount}: the project's folder {here} is not below it, so pods would not see it")
    limits: dict[str, Any] = {"memory": f"{memory_mb}M"}
    if gpus:
        limits[gpu_resource] = gpus
    # /dev/shm of a container is 64 MB, too small for what loaders and NCCL share
    volumes = {
        "project": {"persistentVolumeClaim": {"claimName": claim}},
        "shared-memory": {"emptyDir": {"medium": "Memory"}},
    }
    places = {"project": str(mount.resolve()), "shared-memory": "/dev/shm"}  # noqa: S108
    container = {
        "name": "stage",
        "image": image,
        "command": ["/bin/sh", str(script.resolve())],
        "workingDir": str(here),
        "env": [{"name": "PATH", "value": os.environ["PATH"]}, {"name": "HOME", "value": "/tmp"}],  # noqa: S108
        "resources": {"requests": {"cpu": cpus, **limits}, "limits": limits},
        "volumeMounts": [{"name": name, "mountPath": place} for name, place in places.items()],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {"runAsUser": os.getuid(), "runAsGroup": os.getgid()},
        "containers": [container],
        "volumes": [{"name": name, **volume} for name, volume in volumes.items()],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"generateName": "dayzero-", "labels": {"app": "dayzero"}},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": minutes * 60,
            "ttlSecondsAfterFinished": DAY_SECONDS,
            "template": {"metadata": {"labels": {"app": "dayzero"}}, "spec": pod},
        },
    }


def job_status(job: dict[str, Any]) -> str:
    """What Snakemake calls the state of a Job as `kubectl get job -o json` tells it: running, success or failed."""
    conditions = {it["type"]: it["status"] for it in job.get("status", {}).get("conditions") or []}
    if conditions.get("Complete") == "True":
        return "success"
    return "failed" if conditions.get("Failed") == "True" else "running"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dayzero.kubernetes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--namespace", help="default: that of kubectl's context")
    commands = parser.add_subparsers(dest="command", required=True)
    submit = commands.add_parser("submit", help="prints the job's name")
    submit.add_argument("--image", required=True)
    submit.add_argument("--claim", required=True, help="PersistentVolumeClaim that holds the project")
    submit.add_argument("--mount", required=True, type=Path, help="where it is mounted, here and in the pods")
    submit.add_argument("--cpus", required=True, type=int)
    submit.add_argument("--memory-mb", required=True, type=int)
    submit.add_argument("--minutes", required=True, type=int, help="after which the cluster ends the job")
    submit.add_argument("--gpus", required=True, type=int)
    submit.add_argument("--gpu-resource", default="nvidia.com/gpu", help="what the cluster calls a GPU")
    submit.add_argument("script", type=Path, help="Snakemake's job script")
    status = commands.add_parser("status", help="prints running, success or failed")
    status.add_argument("job", help="as submit printed it")
    args = vars(parser.parse_args(argv))
    namespace, command = args.pop("namespace"), args.pop("command")
    try:
        if command == "submit":
            manifest = json.dumps(job_manifest(**args))
            print(_kubectl(namespace, "create", "-f", "-", "-o", "name", stdin=manifest).strip())
        else:
            print(_status(namespace, args["job"]))
    except KubernetesError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _status(namespace: str | None, job: str) -> str:
    found = _kubectl(namespace, "get", job, "-o", "json", "--ignore-not-found")
    return job_status(json.loads(found)) if found.strip() else "failed"  # somebody deleted it


def _kubectl(namespace: str | None, *command: str, stdin: str | None = None) -> str:
    where = ["--namespace", namespace] if namespace else []
    try:
        done = subprocess.run(
            ["kubectl", *where, *command], input=stdin, text=True, capture_output=True, timeout=SECONDS
        )
    except FileNotFoundError:
        raise KubernetesError("kubectl is not on PATH: install it, with a context of the cluster") from None
    except subprocess.TimeoutExpired:
        raise KubernetesError(f"kubectl {command[0]} does not answer within {SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise KubernetesError(lines[-1] if lines else f"kubectl {command[0]}: exit code {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
