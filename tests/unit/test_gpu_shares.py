"""Stages that share an allocation, or a machine, share out its GPUs: CUDA_VISIBLE_DEVICES says which those are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dayzero import gpu_shares
from dayzero.errors import ConfigError
from dayzero.gpu_shares import VISIBLE, own_gpus


def test_each_training_has_gpus_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "GPU-a,GPU-b,GPU-c,GPU-d")
    with own_gpus(2, "7", tmp_path) as first:
        assert first == ["GPU-a", "GPU-b"]
        assert os.environ[VISIBLE] == "GPU-a,GPU-b"
        monkeypatch.setenv(VISIBLE, "GPU-a,GPU-b,GPU-c,GPU-d")
        with own_gpus(1, "7", tmp_path) as second, own_gpus(1, "8", tmp_path) as elsewhere:
            assert second == ["GPU-c"]
            assert elsewhere == ["GPU-c"]  # the second's own, seen through what it left visible
        assert os.environ[VISIBLE] == "GPU-a,GPU-b,GPU-c,GPU-d"
    with own_gpus(4, "7", tmp_path) as everything:
        assert everything == ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]


def test_a_training_waits_until_enough_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1,2")
    code = (
        "import sys, time; from pathlib import Path; from dayzero.gpu_shares import own_gpus\n"
        f"with own_gpus(2, '7', Path({str(tmp_path)!r})): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
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
    with own_gpus(2, "7", tmp_path) as mine:
        assert mine == ["0", "1"]
    assert len(waits) == 2


@pytest.mark.parametrize("there", [[], ["0"]])
def test_with_fewer_gpus_than_wanted_nothing_changes(
    there: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(gpu_shares, "_counted", lambda: there)
    with own_gpus(2, "7", tmp_path):
        assert VISIBLE not in os.environ
    assert not list(tmp_path.iterdir())


def test_the_only_gpu_is_one_stage_s_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr(gpu_shares, "_counted", lambda: ["0"])
    with own_gpus(1, "7", tmp_path):
        assert os.environ[VISIBLE] == "0"
        monkeypatch.setattr(gpu_shares.time, "sleep", stop_waiting)
        with pytest.raises(TimeoutError), own_gpus(1, "7", tmp_path):
            pass
    assert VISIBLE not in os.environ
    with own_gpus(1, "7", tmp_path) as mine:
        assert mine == ["0"]


def stop_waiting(_: float) -> None:
    raise TimeoutError


def test_without_slurm_a_users_stages_share_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1")
    for job, folder in ((None, "local"), ("12", "12")):
        monkeypatch.setenv("SLURM_JOB_ID", job) if job else monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        with own_gpus(1, folder=tmp_path):
            assert (tmp_path / f"dayzero-gpus-{os.getuid()}-{folder}" / "0").is_file()


def test_a_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "0,1")
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"dayzero-gpus-{os.getuid()}-7").symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match="belongs to somebody else"), own_gpus(1, "7", tmp_path):
        pass
