"""Free memory within the limits that containers and jobs have, on folders laid out as the kernel does."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from dayzero import memory
from dayzero.memory import available_memory

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in place of /sys/fs/cgroup, on a machine with 64 GiB free."""
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "cgroup")
    free = psutil.virtual_memory()._replace(available=64 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    return tmp_path / "cgroup"


def own(groups: Path, *lines: str) -> None:
    (groups.parent / "own").write_text("".join(f"{line}\n" for line in lines))


def group(folder: Path, limit: str, used: float, inactive: float = 0.0, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{int(used * GIB)}\n")
    name = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon 5\n{name} {int(inactive * GIB)}\n")


def test_no_groups_at_all(groups: Path) -> None:
    assert available_memory(CPU) == 64 * GIB


def test_a_slurm_job_s_limit_stands_above_its_task(groups: Path) -> None:
    """The root, as a real one, has no memory.max."""
    own(groups, "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0")
    job = groups / "system.slice/slurmstepd.scope/job_7"
    group(job, str(6 * GIB), 2)
    group(job / "step_0/user/task_0", "max", 1)
    assert available_memory(CPU) == 4 * GIB
    group(job / "step_0", str(2 * GIB), 1)
    assert available_memory(CPU) == 1 * GIB
    group(job / "step_0", str(2 * GIB), 3)
    assert available_memory(CPU) == 0


def test_files_that_were_read_are_no_loss(groups: Path) -> None:
    own(groups, "0::/job")
    group(groups / "job", str(6 * GIB), 6, inactive=5)
    assert available_memory(CPU) == 5 * GIB


def test_version_1(groups: Path) -> None:
    own(groups, "12:cpu,cpuacct:/other", "4:memory:/slurm/uid_0/job_7/step_0", "0::/unlimited")
    group(groups / "memory/slurm/uid_0/job_7", str(8 * GIB), 3, inactive=1, version=1)
    group(groups / "memory/slurm/uid_0/job_7/step_0", "9223372036854771712", 3, version=1)
    group(groups / "other", str(GIB), 0)
    assert available_memory(CPU) == 6 * GIB


@pytest.mark.parametrize("path", ["/", "/docker/0123/as/the/host/sees/it", "/../../elsewhere"])
@pytest.mark.parametrize("version", [1, 2])
def test_inside_a_container(groups: Path, path: str, version: int) -> None:
    own(groups, f"{'5:memory' if version == 1 else '0:'}:{path}")
    group(groups / "memory" if version == 1 else groups, str(3 * GIB), 1, version=version)
    group(groups.parent / "elsewhere", str(GIB), 1)
    assert available_memory(CPU) == 2 * GIB


def test_a_checked_export_obeys_the_limit(groups: Path, tmp_path: Path) -> None:
    from dayzero.engine.export import reloaded_logits

    from tests.exported import tiny_export

    model = tiny_export(tmp_path / "model")
    tokens = torch.arange(3, 9)[None]
    whole, how = reloaded_logits(model, tokens)
    assert how == "from_pretrained"
    own(groups, "0::/job")
    group(groups / "job", "1000", 0)
    (groups / "job/memory.stat").unlink()  # some kernels have none
    streamed, how = reloaded_logits(model, tokens)
    assert how == "layer by layer"
    assert torch.allclose(whole, streamed, atol=1e-5)
