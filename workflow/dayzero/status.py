"""A live table of an experiment's runs, read from their files and the queue alone: `python -m dayzero.status`.

Nothing is asked of the jobs themselves, so it works on a login node while they run elsewhere.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dayzero.config import RunConfig
from dayzero.errors import ConfigError
from dayzero.files import read_json_lines
from dayzero.run_lock import read_lock
from dayzero.site_config import load
from dayzero.slurm import SECONDS

STAGES = {
    "train": "train/summary.json",
    "export": "model/manifest.json",
    "evaluate": "eval/results.json",
    "verify_serving": "serve/parity.json",
}
"""The stages of a run in their order, and the file that each writes last."""
RECENT_STEPS = 20
QUEUE_FORMAT = "%i|%T|%N|%Z|%k|%r"
SILENT_SECONDS = 120


@dataclass(frozen=True)
class Queued:
    """A job of the queue: what it is and how it stands."""

    job_id: str
    state: str
    node: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One row of the table; None where nothing is known."""

    run: str
    stage: str
    step: int | None = None
    total: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    job_id: str = ""
    node: str = ""
    state: str = ""


def queue(folder: Path) -> dict[tuple[str, str], Queued]:
    """(rule, run) -> its job, of the jobs that Snakemake submitted from `folder`; empty without SLURM."""
    try:
        done = subprocess.run(
            ["squeue", "--me", "--noheader", f"--format={QUEUE_FORMAT}"],
            text=True,
            capture_output=True,
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return parse_queue(done.stdout, folder)


def parse_queue(text: str, folder: Path) -> dict[tuple[str, str], Queued]:
    """Lines of squeue in `QUEUE_FORMAT`; the comment is how the plugin names a job: rule_train_wildcards_RUN."""
    jobs = {}
    for line in text.splitlines():
        job_id, state, node, directory, comment, reason = (line.strip().split("|") + [""] * 6)[:6]
        found = re.fullmatch(r"rule_(\w+?)_wildcards_(.+)", comment)
        if "_" in job_id:  # all tasks of an array have the comment of its first
            continue
        if found and Path(directory).resolve() == folder.resolve():
            jobs[found[1], found[2]] = Queued(job_id, state, node, reason)
    return jobs


def run_status(run: RunConfig, folder: Path, jobs: dict[tuple[str, str], Queued]) -> RunStatus:
    """How one run stands."""
    train = folder / "train"
    stages = [stage for stage in STAGES if run.method.name != "none" or stage != "train"]
    missing = [stage for stage in stages if not (folder / STAGES[stage]).exists()]
    if "evaluate" in missing and not (run.evaluate.tasks or run.evaluate.extra_tasks):
        missing.remove("evaluate")
    stage = missing[0] if missing else "done"
    job = next((jobs[stage, run.run] for stage in missing if (stage, run.run) in jobs), None)
    stage = next((s for s in missing if (s, run.run) in jobs), stage)
    lock = read_lock(train) if stage == "train" else None
    state = job.state.lower() if job else ("training" if lock else "")
    if job and job.state == "PENDING" and job.reason not in ("", "None"):
        state += f" ({job.reason})"
    metrics = read_json_lines(
        train / ("metrics.jsonl" if stage != "train" else "checkpoints/metrics.jsonl"), growing=True
    )
    facts = _progress(run, metrics) if metrics else {"total": run.train.max_steps if stage == "train" else None}
    if stage == "train" and lock and metrics and time.time() - (train / "lock.json").stat().st_mtime > SILENT_SECONDS:
        state += ", silent"
    if stage != "train":
        facts.pop("seconds_left", None)
    node = (job.node if job else "") or (str(lock["nodes"] or lock["host"]) if lock else "")
    job_id = job.job_id if job else str((lock and lock["job_id"]) or "")
    return RunStatus(run=run.run, stage=stage, job_id=job_id, node=node, state=state, **facts)


def _progress(run: RunConfig, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    last, recent = metrics[-1], metrics[-RECENT_STEPS:]
    total = run.train.max_steps
    if total is None and last["epoch"]:
        total = max(last["step"], round(last["step"] / last["epoch"] * (run.train.num_epochs or 0)))
    seconds = median(r["step_seconds"] + r["data_seconds"] for r in recent)
    return {
        "step": last["step"],
        "total": total,
        "loss": last["loss"],
        "tokens_per_second": median(r["tokens_per_second"] for r in recent),
        "seconds_left": (total - last["step"]) * seconds if total else None,
    }


def table(rows: list[RunStatus], title: str) -> Table:
    """The rows as a table."""
    made = Table(title=title, title_justify="left")
    for name in ("run", "stage", "step", "loss", "tokens/s", "left", "job", "node", "queue"):
        made.add_column(name, justify="right" if name in ("step", "loss", "tokens/s", "left") else "left")
    for row in rows:
        made.add_row(
            row.run,
            row.stage,
            "" if row.step is None else f"{row.step}/{row.total or '?'}",
            "" if row.loss is None else f"{row.loss:.4f}",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}",
            "" if row.seconds_left is None else duration(row.seconds_left),
            row.job_id,
            row.node,
            row.state,
        )
    return made


def duration(seconds: float) -> str:
    """h:mm:ss, with days where there are any."""
    days, rest = divmod(round(seconds), 86400)
    text = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}d {text}" if days else text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dayzero.status", description=__doc__)
    parser.add_argument("--experiment", help="a name in config/experiments or a file; default: that of config.yaml")
    parser.add_argument("--results", type=Path, help="default: results_dir of config/config.yaml")
    parser.add_argument("--once", action="store_true", help="print the table once and end")
    parser.add_argument("--json", action="store_true", help="with --once: as JSON lines")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks (default 5)")
    args = parser.parse_args(argv)
    try:
        experiment, results = load(args.experiment)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1

    folder = (args.results or Path(results)) / experiment.name

    def look() -> list[RunStatus]:
        jobs = queue(Path.cwd())
        return [run_status(run, folder / name, jobs) for name, run in experiment.runs.items()]

    def title() -> str:
        return f"{experiment.name}, {time.strftime('%Y-%m-%d %H:%M:%S')}"

    if args.once:
        rows = look()
        if args.json:
            print("\n".join(json.dumps(row.__dict__) for row in rows))
        else:
            wide = None if sys.stdout.isatty() else 160  # into a file or a pipe: nothing is cut off
            Console(width=wide).print(table(rows, title()))
        return 0
    try:
        with Live(table(look(), title()), auto_refresh=False, screen=False) as live:
            while True:
                time.sleep(args.every)
                live.update(table(look(), title()), refresh=True)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
