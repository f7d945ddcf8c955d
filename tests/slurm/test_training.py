"""Training on a real SLURM cluster of two virtual nodes: as typed from the project's root, and through every fault."""

from __future__ import annotations

import signal

import pytest
from dayzero.files import read_json

from tests.slurm.conftest import Site

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(420)]


def test_end_to_end_over_two_nodes(site: Site) -> None:
    """Every stage up to scores and serving, training on 2 nodes x 2 processes."""
    targets = ["results/tiny/wide/eval/results.json"]
    site.run(*targets, seconds=400)
    summary = read_json(site.folder("wide") / "summary.json")
    assert summary["world_size"] == 4
    assert [a["outcome"] for a in summary["attempts"]] == []
