"""The cluster and the curve that trainings which meet a fault are held against."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Site


@pytest.fixture(scope="session")
def site(site: Site, accounted: Cluster) -> Site:
    """On the cluster that keeps accounts."""
    return replace(site, cluster=accounted, status_command="sacct")


@pytest.fixture(scope="session")
def curve(site: Site) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of the undisturbed run on this machine, without SLURM."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2"]
    done = subprocess.run(
        [*command, site.summary_file("reference")], cwd=site.path, env=site.environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return site.curve("reference")
