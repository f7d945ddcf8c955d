"""Two clusters of the SLURM tests side by side; nothing is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, _command


def test_a_second_cluster_does_not_reach_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the first one's commands come first on PATH, as `up` says to export."""
    first = Cluster(tmp_path / "first")
    for folder in ("etc", "bin"):
        (first.root / folder).mkdir(parents=True)
    (first.root / "etc/slurm.conf").touch()
    system = tmp_path / "bin"
    system.mkdir()
    for folder in (first.root / "bin", system):
        (folder / "squeue").write_text("#!/bin/sh\n")
        (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([f"{first.root}/bin", "", "/", str(system)]))
    assert _command("squeue") == str(system / "squeue")
    second = Cluster(tmp_path / "second")
    assert second.environment["PATH"].split(os.pathsep) == [f"{second.root}/bin", "", "/", str(system)]
