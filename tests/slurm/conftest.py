"""A cluster of two virtual nodes and one project on it, for all tests of this folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from getpass import getuser
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil
import pytest
from dayzero.files import read_json_lines

from tests.exported import tiny_export
from tests.slurm.cluster import NODES, Cluster, missing
from tests.workflow.project import ROOT, make_project

HERE = Path(__file__).parent
FAULT = "parallelism: {dp_shard: 2}, resources.train: {nodes: 2, gpu: auto}"
DEFAULTS = """
description: a tiny model on two virtual nodes
defaults:
  model.source: local/llama
  data: {source: local/rows.jsonl, format: text, validation_size: 8, test_size: 8}
  tokenize: {seq_len: 64}
  method.lora.rank: 4
  train:
    max_steps: 24
    global_batch_size: 8
    local_batch_size: 2
    precision: fp32
    optimizer.lr: 1.0e-2
    validate_every: 0
    checkpoint.every: 5
  evaluate: {tasks: [text_perplexity], batch_size: 8}
  serving: {num_prompts: 2, max_new_tokens: 4}
  resources:
    check_data: {mem_mb: 1500}
    tokenize: {threads: 1, mem_mb: 1500}
    train: {threads: 2, mem_mb: 3000, runtime: 30, stop_before: 60}
    export: {threads: 1, mem_mb: 1500}
    evaluate: {threads: 1, mem_mb: 2500}
    verify_serving: {threads: 1}
runs:
"""
WHOLE = f"""{DEFAULTS}  wide:
    {{train.max_steps: 4, parallelism: {{dp_shard: 2, tp: 2}}, resources.train: {{nodes: 2, gpu: auto}}}}
"""
EXPERIMENT = f"""{DEFAULTS}  reference: {{{FAULT}}}
  limited: {{{FAULT}}}
  lost: {{{FAULT}}}
  cancelled: {{{FAULT}}}
  preempted: {{{FAULT}}}
  orphaned: {{{FAULT}}}
  filled: {{{FAULT}}}
  ended: {{{FAULT}}}
  first: {{{FAULT}}}
  second: {{{FAULT}}}
"""


@dataclass
class Site:
    """A project and the cluster that its Snakemake submits to."""

    path: Path
    cluster: Cluster
    status_command: str = "squeue"
    """What Snakemake asks for its jobs' states."""
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{HERE / 'hold'}{os.pathsep}{ROOT / 'workflow'}"
        return {**self.cluster.environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Snakemake with the SLURM profile, in the background; what it prints is in printed.txt."""
        command = [sys.executable, str(HERE / "polling.py"), "--profile", "slurm"]
        command += ["--slurm-status-command", self.status_command, "--slurm-init-seconds-before-status-checks", "1"]
        command += ["--latency-wait", "10", *arguments]
        with open(self.path / "printed.txt", "w") as output:
            process = subprocess.Popen(
                command, cwd=self.path, env=self.environment, text=True, stdout=output, stderr=subprocess.STDOUT
            )
        self.started.append(process)
        return process

    def finish(self, process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str]:
        """Exit code and what was printed; too long is a failure."""
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"not done in {seconds} s\n{self.printed()}\n{self.cluster.jobs()}") from None
        return code, self.printed()

    def run(self, *arguments: str, seconds: float = 600) -> str:
        """Snakemake to its end, which must be a good one."""
        code, printed = self.finish(self.start(*arguments), seconds)
        assert code == 0, printed + self.job_logs()
        return printed

    def printed(self) -> str:
        return (self.path / "printed.txt").read_text()

    def job_logs(self) -> str:
        logs = sorted(self.path.glob(".snakemake/slurm_logs/**/*.log"), key=lambda p: p.stat().st_mtime)
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in logs[-3:])

    def folder(self, run: str) -> Path:
        return self.path / "results/tiny" / run / "train"

    def summary_file(self, run: str) -> str:
        return str((self.folder(run) / "summary.json").relative_to(self.path))

    def steps(self, run: str) -> list[dict[str, Any]]:
        """The live metrics."""
        return read_json_lines(self.folder(run) / "checkpoints/metrics.jsonl", growing=True)

    def curve(self, run: str) -> list[tuple[float, float]]:
        """Loss and gradient norm of every step of a finished run."""
        return [(r["loss"], r["grad_norm"]) for r in read_json_lines(self.folder(run) / "metrics.jsonl")]

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = 400) -> Any:
        """Until `condition` holds; its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := condition():
                return value
            time.sleep(0.02)
        raise AssertionError(f"{what}: not in {seconds} s\n{self.printed()}{self.job_logs()}\n{self.cluster.jobs()}")

    def hold(self, run: str, step: int, world_size: int = 2) -> list[psutil.Process]:
        """All ranks of a run that has just been started, once they have stopped themselves (SIGSTOP) after `step`.

        Only this start of the run is held: when it goes on, or starts again, nothing stops it.
        """
        order = self.folder(run).with_name("hold")
        order.parent.mkdir(parents=True, exist_ok=True)
        order.write_text(str(step))

        def held() -> list[psutil.Process]:
            stopped = [rank for rank in self.ranks(run) if rank.status() == psutil.STATUS_STOPPED]
            return stopped if len(stopped) == world_size else []

        ranks = self.wait(held, f"{world_size} ranks of {run} held at step {step}")
        order.unlink()
        assert len(self.steps(run)) == step
        return ranks

    def ranks(self, run: str) -> list[psutil.Process]:
        """The training processes of a run on this site's cluster."""
        found: dict[int, psutil.Process] = {}
        parents: dict[int, int] = {}
        for process in psutil.process_iter():
            try:
                command, environment = process.cmdline(), process.environ()
                if (
                    {"dayzero.stages.train", str(self.folder(run).relative_to(self.path))} <= {*command}
                    and "TORCHELASTIC_RUN_ID" in environment
                    and process.cwd() == str(self.path)
                ):
                    found[process.pid], parents[process.pid] = process, process.ppid()
            except (psutil.Error, OSError):
                continue
        # what a rank has forked has the rank's command line and environment until it becomes another program
        return [process for pid, process in found.items() if parents[pid] not in found]

    def job_of(self, run: str) -> str:
        """The job that trains a run now."""
        return str(json.loads((self.folder(run) / "lock.json").read_text())["job_id"])


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Without accounting, as small sites are."""
    with running() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def accounted() -> Iterator[Cluster]:
    """With a database of jobs, as large sites are."""
    with running("physics", "biology") as cluster:
        yield cluster


@contextmanager
def running(*accounts: str) -> Iterator[Cluster]:
    if problem := missing():
        pytest.exit(problem, returncode=1)
    cluster = Cluster(Path(mkdtemp(prefix="dz-slurm-", dir="/tmp")), accounts=accounts)  # short: sockets lie in it

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, leave)  # ended from outside, the cluster is taken down too
    try:
        yield cluster.up()
    finally:
        cluster.down()
        subprocess.run(["rm", "-rf", str(cluster.root)], check=False)


@pytest.fixture(scope="session")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """One project for all tests: they share its data, tokens and model, each has a run of its own."""
    project = make_project(tmp_path_factory.mktemp("site"), EXPERIMENT)
    (project.path / "config/experiments/whole.yaml").write_text(WHOLE)
    tiny_export(project.path / "local/llama", num_key_value_heads=2, tie_word_embeddings=True)
    rows = [{"text": f"Row {i}: {i} + {i + 1} is {2 * i + 1}, and the fox jumps {i} times."} for i in range(80)]
    (project.path / "local/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Site(project.path, cluster)


@pytest.fixture(autouse=True)
def nothing_left(site: Site) -> Iterator[None]:
    """After each test, a failed one too, no Snakemake runs, no job is in the queue and both nodes are up."""
    yield
    for process in site.started:
        process.kill()
        process.wait()
    site.started.clear()
    site.cluster.call("scancel", f"--user={getuser()}", check=False)
    site.wait(lambda: not site.cluster.call("squeue", "-h").strip(), "an empty queue", 120)
    site.cluster.up()
    assert len(NODES) == 2
