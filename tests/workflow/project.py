"""A copy of the workflow in a temporary folder, with local data and models, run by the real Snakemake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).parent / "stand_in"

Jobs = set[str]
"""`rule` or `rule:run`; jobs of the store by their rule alone."""

TINY = """
description: small stand-ins
defaults:
  model.source: local/model
  data: {source: [local/rows.jsonl, local/more.jsonl], weights: [1, 1], validation_size: 2, test_size: 2}
  train: {max_steps: 2, global_batch_size: 4, local_batch_size: 4}
  evaluate.tasks: [exact]
runs:
  base: {method.name: none}
  low: {train.optimizer.lr: 1.0e-5}
  high: {train.optimizer.lr: 1.0e-3}
"""


@dataclass
class Project:
    """A folder that `snakemake` can be typed in."""

    path: Path

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Snakemake with the stand-ins; stdout and stderr come together in `stdout`."""
        output = self.path / "printed.txt"
        order = {"cwd": str(self.path), "arguments": arguments, "output": str(output)}
        server = _server()
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(["snakemake", *arguments], code, output.read_text())

    def run(self, *arguments: str) -> str:
        """Run Snakemake, which must succeed, and return what it printed."""
        done = self.snakemake(*arguments)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def planned(self, *arguments: str) -> Jobs:
        """The jobs of a dry run, without the target rule `all`."""
        return planned_jobs(self.run("--dry-run", *arguments))

    def store(self, kind: str) -> Path:
        """The only directory of one kind in the store."""
        (directory,) = (path for path in (self.path / "results/store" / kind).iterdir() if path.is_dir())
        return directory

    @contextmanager
    def without(self, path: str | Path) -> Iterator[None]:
        """The file is away inside the block."""
        file, aside = self.path / path, self.path / "aside"
        file.rename(aside)
        try:
            yield
        finally:
            aside.rename(file)

    @contextmanager
    def edited(self, path: str, text: str) -> Iterator[None]:
        """The file holds `text` inside the block, then its old text and time again."""
        file = self.path / path
        before, times = (file.read_text(), file.stat()) if file.exists() else (None, None)
        file.write_text(text)
        try:
            yield
        finally:
            if before is None or times is None:
                file.unlink()
            else:
                file.write_text(before)
                os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@cache
def _server() -> subprocess.Popen[str]:
    environment = dict(
        os.environ, OMP_NUM_THREADS="1", COLUMNS="200", PYTHONPATH=f"{STAND_IN}{os.pathsep}{ROOT / 'workflow'}"
    )
    command = [sys.executable, Path(__file__).with_name("snakemake_server.py")]
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def make_project(path: Path, experiment: str | None = TINY) -> Project:
    """Copy the workflow to `path`; `experiment` becomes config/experiments/tiny.yaml, the one that is run."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("config", "workflow/rules", "workflow/report", "profiles", "envs"):
        shutil.copytree(ROOT / name, path / name)
    shutil.copy(ROOT / "Snakefile", path)
    (path / "slurm").symlink_to("profiles/slurm")
    if experiment:
        (path / "config/experiments/tiny.yaml").write_text(experiment)
        config = path / "config/config.yaml"
        config.write_text(config.read_text().replace("experiment: demo", "experiment: tiny"))
        (path / "config/tasks/exact.yaml").write_text("task: exact\n")
        (path / "config/tasks/other.yaml").write_text("task: other\n")
        (path / "local/model").mkdir(parents=True)
        (path / "local/model/config.json").write_text("{}\n")
        (path / "local/rows.jsonl").write_text('{"text": "a"}\n')
        (path / "local/more.jsonl").write_text('{"text": "b"}\n')
    return Project(path)


def planned_jobs(printed: str) -> Jobs:
    """The jobs that a dry run printed."""
    jobs: Jobs = set()
    for block in re.split(r"\n(?=(?:local)?rule \w+:)", printed)[1:]:
        rule = re.match(r"(?:local)?rule (\w+):", block)
        run = re.search(r"^    wildcards: .*\brun=([^,\s]+)", block, re.MULTILINE)
        assert rule
        if rule[1] != "all":
            jobs.add(f"{rule[1]}:{run[1]}" if run else rule[1])
    return jobs
