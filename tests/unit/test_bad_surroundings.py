"""Full disks, read-only folders, spoilt configs and files: one last readable line, a non-zero exit, nothing left."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dayzero.config import Data
from dayzero.errors import ConfigError, one_line
from dayzero.files import check_writable
from dayzero.stages import fetch_data, fetch_model, tokenize, train_tokenizer
from pydantic import ValidationError

from tests.small_disk import mounted

DATA = '{"data": {"source": "rows.jsonl", "format": "text", "validation_size": 0}}'


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {os.urandom(2000).hex()}"}) + "\n" for i in range(100)))
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    with mounted(tmp_path / "disk", "64k") as disk:
        yield disk


def _run(stage: str, *arguments: str | Path) -> tuple[int, str]:
    command = [sys.executable, "-m", f"dayzero.stages.{stage}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    assert "Logging error" not in done.stderr, done.stderr
    return done.returncode, done.stderr.strip().splitlines()[-1]


def test_no_space_left(rows: Path, small_disk: Path) -> None:
    code, last = _run("fetch_data", "--config", DATA, "--output", small_disk / "entry", "--log", small_disk / "a.log")
    assert code == 1
    assert last.startswith("fetch_data: error: no space left on the disk of ")
    assert last.endswith(": free some, or set results_dir to a larger disk")
    assert not (small_disk / "entry").exists()
    (small_disk / "fill").write_bytes(b"\0" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize))
    code, last = _run("fetch_data", "--config", DATA, "--output", small_disk / "entry", "--log", small_disk / "a.log")
    assert code == 1
    assert "no space left on the disk of" in last  # not even for the log


def test_a_read_only_folder(rows: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    folder = small_disk / "results"
    for log in ([], ["--log", folder / "logs/a.log"]):
        code, last = _run("fetch_data", "--config", DATA, "--output", folder / "entry", *log)
        assert code == 1
        assert last.startswith(f"fetch_data: error: cannot write {folder}")
        assert last.endswith(": make it writable, or set results_dir to a folder that is")
    with pytest.raises(ConfigError, match=f"cannot write {folder}: make it writable"):
        check_writable(folder)


def test_a_folder_that_can_be_written_is_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "new/results")
    assert list((tmp_path / "new/results").iterdir()) == []


def test_a_results_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(ConfigError, match="results is not a folder: set results_dir to one"):
        check_writable(tmp_path / "results")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("nowhere.json", "nowhere.json does not exist: correct the path, or run the stage that makes it first"),
        (
            '{"data": ',
            "--config: not valid JSON (Expecting value: line 1 column 10 (char 9)): give a run's config.json",
        ),
        ("spoilt.json", "spoilt.json: not valid JSON"),
        ("list.json", "--config list.json: not a JSON object: give a run's config.json"),
        ("{}", "data.source: name the rows to use (hf:, package: or local files)"),
        ('{"data": {"sorce": 1}}', "the config has sorce = 1: Extra inputs are not permitted"),
        ('{"data": {"max_rows": "1e3"}}', "the config has max_rows = '1e3': Input should be a valid integer"),
    ],
)
def test_configs(config: str, said: str, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("spoilt.json").write_text("{")
    Path("list.json").write_text("[1]")
    assert fetch_data.main(["--config", config, "--output", "out"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.splitlines()[-1].startswith(f"fetch_data: error: {said}")
    assert not Path("out").exists()


def test_fetch_model_without_a_source(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_model.main(["--config", "{}", "--output", "out"]) == 1
    assert "model.source is not set" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("stage", [tokenize, train_tokenizer])
@pytest.mark.parametrize("manifest", [None, "{", '{"format": "text", "splits": {"train": {"file": "train.parquet"}}}'])
def test_spoilt_data_folders(stage, manifest: str | None, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.tiny_tokenizer import tiny_tokenizer

    Path("data").mkdir()
    Path("data/train.parquet").write_text("no Parquet")
    if manifest:
        Path("data/manifest.json").write_text(manifest)
    config = '{"model": {"tokenizer": {"vocab_size": 300}}}'
    more = ["--tokenizer", str(tiny_tokenizer(Path("tokenizer")))] if stage is tokenize else []
    assert stage.main(["--config", config, "--data", "data", *more, "--output", "out"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    remedy = {None: "does not exist: correct the path, or run", "{": "not valid JSON"}.get(
        manifest, "fetch the data ag"
    )
    assert printed.splitlines()[-1].startswith(f"{stage.__name__.rpartition('.')[2]}: error: ")
    assert remedy in printed.splitlines()[-1]
    assert "data/" in printed.splitlines()[-1]
    assert not Path("out").exists()


def test_one_line() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/big/file")
    assert one_line(full).startswith("no space left on the disk of /big/file: ")
    assert one_line(RuntimeError("two\nlines")) == "RuntimeError: two lines"
    assert one_line(ConfigError("said\nso")) == "said so"
    with pytest.raises(ValidationError) as refused:
        Data.model_validate({"format": "prose"})
    assert "format = 'prose': Input should be 'auto', 'text'" in one_line(refused.value)
