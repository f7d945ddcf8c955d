"""The log of each start, and the error that a rank leaves for the launching process."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dayzero.engine.launch import errors_reported, first_report, leave_report


def test_the_log_of_an_earlier_or_a_live_start_stays(tmp_path: Path) -> None:
    """Snakemake removes train.log before each start: of a requeued job, and of a second one that is then refused."""
    log_file = tmp_path / "logs/train.log"

    def start(said: str, job: str) -> subprocess.Popen[str]:
        script = f"from dayzero.console import log, setup_logging; setup_logging('train', {str(log_file)!r}); "
        script += f"log.info('{said} begins'); input(); log.info('{said} goes on')"
        environment = {**os.environ, "SLURM_JOB_ID": job}
        environment.pop("DAYZERO_OWN_LOG", None)
        process = subprocess.Popen(
            [sys.executable, "-c", script], env=environment, text=True, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (log_file.exists() and f"{said} begins" in log_file.read_text()):
            time.sleep(0.05)
        return process

    first = start("the first", "23")
    first.communicate("\n", timeout=60)
    log_file.unlink()
    second = start("the second", "23")
    log_file.unlink()
    other = start("the other", "26")
    other.communicate("\n", timeout=60)
    second.communicate("\n", timeout=60)
    said = {
        path.name: re.findall(r"the \w+ (?:begins|goes on)", path.read_text()) for path in log_file.parent.iterdir()
    }
    assert said == {
        "train-23-0.log": ["the first begins", "the first goes on"],
        "train-23-1.log": ["the second begins", "the second goes on"],
        "train-26-0.log": (newest := ["the other begins", "the other goes on", "the second goes on"]),
        "train.log": newest,
    }


def test_missing_kernels_of_torchao_are_not_in_the_log(tmp_path: Path) -> None:
    """transformers imports it in every training; of its kernels for GPUs it warns three times a process."""
    script = "from dayzero.console import setup_logging; setup_logging('train', 'train.log'); import torchao"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "train.log").read_text() == ""


def test_a_rank_that_was_started_by_hand_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAYZERO_ERROR_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no"), errors_reported(3):
        raise ValueError("no")
    assert not list(tmp_path.iterdir())


def test_an_error_that_cannot_be_left_where_all_nodes_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAYZERO_ERROR_DIR", f"{tmp_path / 'full'}{os.pathsep}{tmp_path}")
    with pytest.raises(ValueError, match="no"), errors_reported(3):
        raise ValueError("no")
    rank, report = first_report(tmp_path / "full", tmp_path) or ("", {})
    assert (rank, report["line"]) == ("3", "no")
    assert "in test_an_error" in report["traceback"]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        leave_report(tmp_path, "4", "no", "")
    assert [p.name for p in tmp_path.iterdir()] == ["3.json"]
