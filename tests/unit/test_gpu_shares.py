"""Stages that share an allocation, or a machine, share out its GPUs: CUDA_VISIBLE_DEVICES says which those are."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from dayzero import gpu_shares
from dayzero.errors import ConfigError
from dayzero.gpu_shares import VISIBLE, own_gpus


@pytest.fixture(autouse=True)
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with four, in the SLURM job 7, with temporary files of the test's own."""
    monkeypatch.setattr(gpu_shares, "_for_gpus", lambda: True)
    monkeypatch.setattr(gpu_shares, "_count", lambda: 4)
    monkeypatch.setattr(gpu_shares.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")


def locks(folder: Path, job: str) -> Path:
    return folder / f"dayzero-gpus-{os.getuid()}-{socket.gethostname()}-{job}"


def test_each_training_has_gpus_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "GPU-a,GPU-b,GPU-c,GPU-d")
    with own_gpus(2) as first:
        assert first == ["GPU-a", "GPU-b"]
        assert os.environ[VISIBLE] == "GPU-a,GPU-b"
        monkeypatch.setenv(VISIBLE, "GPU-a,GPU-b,GPU-c,GPU-d")
        with own_gpus(1) as second:
            assert second == ["GPU-c"]
            monkeypatch.setenv("SLURM_JOB_ID", "8")
            with own_gpus(1) as elsewhere:
                assert elsewhere == ["GPU-c"]  # the second's own, seen through what it left visible
            monkeypatch.setenv("SLURM_JOB_ID", "7")
        assert os.environ[VISIBLE] == "GPU-a,GPU-b,GPU-c,GPU-d"
    with own_gpus(4) as everything:
        assert everything == ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]


def test_a_training_waits_until_enough_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1,2")
    code = (
        "import sys; from dayzero import gpu_shares; gpu_shares._for_gpus = lambda: True\n"
        "with gpu_shares.own_gpus(2): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdin
    assert other.stdout
    assert other.stdout.readline() == "held\n"
    waits = []

    def wait(_: float) -> None:
        waits.append(1)
        if len(waits) == 2:
            other.kill()  # the system frees its locks
            other.wait()

    monkeypatch.setattr(gpu_shares.time, "sleep", wait)
    with own_gpus(2) as mine:
        assert mine == ["0", "1"]
    assert len(waits) == 2


@pytest.mark.parametrize("count", [0, 1])
def test_with_fewer_gpus_than_wanted_nothing_changes(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(gpu_shares, "_count", lambda: count)
    with own_gpus(2):
        assert VISIBLE not in os.environ
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("-1", []),
        ("NoDevFiles", []),
        ("", []),
        ("0, 1,-1,2", ["0", "1"]),
        ("MIG-a,MIG-b/1", ["MIG-a", "MIG-b/1"]),
    ],
)
def test_names_that_are_no_gpus_are_not_shared_out(
    visible: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VISIBLE, visible)
    with own_gpus(2) as both:
        assert both == expected
        assert os.environ[VISIBLE] == (",".join(expected) or visible)
        assert len([file for folder in tmp_path.iterdir() for file in folder.iterdir()]) == len(expected)


def test_without_a_torch_for_gpus_nothing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_shares, "_for_gpus", lambda: False)
    monkeypatch.setenv(VISIBLE, "0")
    with own_gpus(1) as mine, own_gpus(1) as others:
        assert mine == others == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["evaluate", "verify_serving"])
def test_stages_take_a_gpu_before_transformers_is_imported(stage: str, tmp_path: Path) -> None:
    """With torchao its import asks for the GPUs, which settles what CUDA_VISIBLE_DEVICES was for the process."""
    code = (
        "import sys; from dayzero import gpu_shares\n"
        "def own_gpus(wanted): print(*{'transformers', 'torchao', 'vllm'} & sys.modules.keys()); sys.exit(7)\n"
        f"gpu_shares.own_gpus = own_gpus; from dayzero.stages import {stage} as stage; sys.argv[0] = 'stage'\n"
        f"sys.exit(stage.main(['--config', '{{}}', '--model', 'm', '--output', '{tmp_path}', *{MORE[stage]!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert (done.returncode, done.stdout.strip()) == (7, ""), done.stderr


MORE = {"evaluate": ["--data", "d", "--tasks-dir", "t"], "verify_serving": ["--tokens", "t"]}


def test_who_waits_may_give_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0")
    with own_gpus(1), pytest.raises(TimeoutError), own_gpus(1, waiting=give_up):
        pass


def give_up() -> None:
    raise TimeoutError


def test_the_only_gpu_is_one_stage_s_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(gpu_shares, "_count", lambda: 1)
    with own_gpus(1):
        assert os.environ[VISIBLE] == "0"
        monkeypatch.setattr(gpu_shares.time, "sleep", stop_waiting)
        with pytest.raises(TimeoutError), own_gpus(1):
            pass
    assert VISIBLE not in os.environ
    with own_gpus(1) as mine:
        assert mine == ["0"]


def stop_waiting(_: float) -> None:
    raise TimeoutError


def test_without_slurm_a_users_stages_share_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1")
    for job, name in ((None, "local"), ("12", "12")):
        monkeypatch.setenv("SLURM_JOB_ID", job) if job else monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        with own_gpus(1):
            assert (locks(tmp_path, name) / "0").is_file()


def test_a_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1")
    (tmp_path / "theirs").mkdir()
    locks(tmp_path, "7").symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="belongs to somebody else"), own_gpus(1):
        pass
