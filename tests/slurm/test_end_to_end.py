"""A whole experiment on a real SLURM cluster of two virtual nodes, as typed from the project's root.

The cluster keeps no accounts: Snakemake learns from squeue how its jobs ended, in faults from sacct.
"""

from __future__ import annotations

import pytest
from dayzero.files import read_json

from tests.slurm.conftest import Site

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_end_to_end_over_two_nodes(site: Site) -> None:
    """Every stage to the report; training on 2 nodes x 2 processes with their GPUs."""
    site.run("--config", "experiment=whole")
    run = site.path / "results/whole/wide"
    summary = read_json(run / "train/summary.json")
    (attempt,) = summary["attempts"]
    assert (summary["world_size"], attempt["num_nodes"], attempt["gpus"], attempt["requeues"]) == (4, 2, 4, 0)
    job = summary["provenance"]["slurm"]
    assert (job["job_id"], job["nodes"], job["gpus"]) == (attempt["job_id"], "node[1-2]", 4)
    assert job["gpu_hours"] > 0
    assert {p.name for p in (run / "logs/ranks").iterdir()} == {f"rank_{i}.log" for i in range(4)}
    assert not list((run / "train").glob(".launch-*"))
    assert not (run / "train/lock.json").exists()
    scores, parity = read_json(run / "eval/results.json"), read_json(run / "serve/parity.json")
    jobs = {stage["provenance"]["slurm"]["job_id"] for stage in (summary, scores, parity)}
    assert len(jobs) == 3
    assert parity["verdict"] == "pass"
    report = (site.path / "results/whole/report/index.html").read_text()
    assert all(shown in report for shown in ("node[1-2]", *jobs))
