"""A live table of an experiment's runs, read from their files and the queue alone: `python -m dayzero.status`.

Nothing is asked of the jobs themselves, so it works on a login node while they run elsewhere.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dayzero import slurm
from dayzero.attempts import Attempts
from dayzero.config import RunConfig
from dayzero.errors import ConfigError, DataError, one_line
from dayzero.files import read_json_lines
from dayzero.run_lock import LOCK, job_name, read_lock
from dayzero.site_config import load
from dayzero.slurm_plugin import OF_EXPERIMENT
from dayzero.wiring import Wiring

STAGES = {
    "train": "train/summary.json",
    "export": "model/manifest.json",
    "evaluate": "eval/results.json",
    "verify_serving": "serve/parity.json",
}
"""The stages of a run in their order, and the file that each writes last."""
RULES = {"data": "fetch_data", "models": "fetch_model", "tokenizers": "train_tokenizer", "tokens": "tokenize"}
"""The folders of the store that a run waits for first, and the rule that fills each."""
OF_THE_STORE = {*RULES.values(), "check_data"}
"""Rules whose jobs belong to every experiment that uses what they make."""
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


def queue(folder: Path, experiment: str) -> tuple[dict[tuple[str, str], Queued], list[str]]:
    """What `parse_queue` and `shared_jobs` say of the experiment's jobs submitted from `folder`; nothing without SLURM.

    Raises SlurmError where squeue does not answer: jobs that it would show may be there.
    """
    try:
        text = slurm.ask("squeue", "--me", "--noheader", f"--format={QUEUE_FORMAT}")
    except slurm.SlurmError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return {}, []
        raise
    return parse_queue(text, folder, experiment), shared_jobs(text, folder, experiment)


def parse_queue(text: str, folder: Path, experiment: str) -> dict[tuple[str, str], Queued]:
    """(rule, run or key of the store) -> its job, of lines of squeue in `QUEUE_FORMAT`."""
    return {(rule, name): job for rule, name, job in _named(text, folder, experiment) if name}


def shared_jobs(text: str, folder: Path, experiment: str) -> list[str]:
    """The jobs of several runs, in words: squeue does not tell of which ones."""
    return [f"{job.job_id} ({rule}) {_state(job)}" for rule, name, job in _named(text, folder, experiment) if not name]


def _named(text: str, folder: Path, experiment: str) -> Iterator[tuple[str, str, Queued]]:
    """Rule, wildcard and job, by the comment that it was given: rule_train_wildcards_RUN, or rule_GROUP, @EXPERIMENT.

    An array has no wildcard here either: all its tasks have the comment of its first. What an experiment puts into the
    store, all others wait for too.
    """
    for line in text.splitlines():
        job_id, state, node, directory, comment, reason = (line.strip().split("|") + [""] * 6)[:6]
        comment, _, of = comment.partition(OF_EXPERIMENT)
        found = re.fullmatch(r"rule_(.+?)(?:_wildcards_(.+))?", comment)
        if not found or Path(directory).resolve() != folder.resolve():
            continue
        if of == experiment or found[1] in OF_THE_STORE:
            yield found[1], "" if "_" in job_id else found[2] or "", Queued(job_id, state, node, reason)


def _state(job: Queued) -> str:
    reason = f" ({job.reason})" if job.state == "PENDING" and job.reason not in ("", "None") else ""
    return job.state.lower() + reason


def run_status(
    run: RunConfig, folder: Path, jobs: dict[tuple[str, str], Queued], needs: Sequence[Path] = ()
) -> RunStatus:
    """How one run stands. `needs`: the directories of the store that it starts from.

    Raises ConfigError, DataError and OSError for files that cannot be read.
    """
    train = folder / "train"
    stages = [stage for stage in STAGES if run.method.name != "none" or stage != "train"]
    missing = [stage for stage in stages if not (folder / STAGES[stage]).exists()]
    if "evaluate" in missing and not (run.evaluate.tasks or run.evaluate.extra_tasks):
        missing.remove("evaluate")
    stage = missing[0] if missing else "done"
    job = next((jobs[stage, run.run] for stage in missing if (stage, run.run) in jobs), None)
    stage = next((s for s in missing if (s, run.run) in jobs), stage)
    lock, silent = _lock(train) if stage == "train" else (None, False)
    if stage == stages[0] and not job and not lock:
        unmade = [(RULES[p.parent.name], p.name) for p in needs if not (p / "manifest.json").exists()]
        if unmade:
            stage, key = next((rule for rule in unmade if rule in jobs), unmade[0])
            job = jobs.get((stage, key))
    state = _state(job) if job else ("training" if lock else _last_end(train) if stage == "train" else "")
    metrics = read_json_lines(
        train / ("metrics.jsonl" if stage != "train" else "checkpoints/metrics.jsonl"), growing=True
    )
    facts = _progress(run, metrics) if metrics else {"total": run.train.max_steps if stage == "train" else None}
    if silent:
        state += ", silent"
    if stage != "train" or not (job or lock):  # nobody works at it
        facts.pop("seconds_left", None)
    node = (job.node if job else "") or (str(lock["nodes"] or lock["host"]) if lock else "")
    job_id = job.job_id if job else job_name(lock) if lock else ""
    return RunStatus(run=run.run, stage=stage, job_id=job_id, node=node, state=state, **facts)


def _lock(train: Path) -> tuple[dict[str, Any] | None, bool]:
    """The lock of a training, and whether its holder is silent; no lock where the training ends meanwhile."""
    try:
        last_sign = (train / LOCK).stat().st_mtime
    except FileNotFoundError:
        return None, False
    lock = read_lock(train)
    return lock, lock is not None and time.time() - last_sign > SILENT_SECONDS


def _last_end(train: Path) -> str:
    """How the last start of a training ended that nobody continues now: failed, stopped or lost. Empty: none did."""
    attempts = Attempts(train).all()
    outcome = str(attempts[-1].get("outcome", "lost")) if attempts else ""
    return "" if outcome == "finished" else outcome  # its results were removed since


def _needs(wiring: Wiring, run: RunConfig) -> list[Path]:
    """The directories of the store that a run's first stage reads, in the order in which they are made."""
    start = [Path(file).parent for file in (*wiring.start(run.run), *wiring.teacher(run.run))]
    start = [path for path in start if path.parent.parent == Path(wiring.store)]
    if run.method.name == "none":
        return start
    return [Path(wiring.data(run)), *start, Path(wiring.tokens(run))]


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


def table(rows: list[RunStatus], title: str, shared: Sequence[str] = (), problem: str = "") -> Table:
    """The rows as a table; below it the `shared` jobs and what kept the queue from being shown."""
    below = "\n".join(filter(None, [f"of several runs: {', '.join(shared)}" if shared else "", problem])) or None
    made = Table(title=title, title_justify="left", caption=below, caption_justify="left")
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
        wiring = Wiring(experiment, str(args.results or results))
        needs = {name: _needs(wiring, run) for name, run in experiment.runs.items()}
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1

    folder = Path(wiring.experiment)

    def row(name: str, jobs: dict[tuple[str, str], Queued]) -> RunStatus:
        try:
            return run_status(experiment.runs[name], folder / name, jobs, needs[name])
        except (ConfigError, DataError, OSError) as error:  # of this run alone
            return RunStatus(run=name, stage="?", state=one_line(error))

    def look() -> tuple[list[RunStatus], list[str], str]:
        jobs: dict[tuple[str, str], Queued] = {}
        shared: list[str] = []
        problem = ""
        try:
            jobs, shared = queue(Path.cwd(), experiment.name)
        except slurm.SlurmError as error:
            problem = f"the queue is not known: {error}"
        return [row(name, jobs) for name in experiment.runs], shared, problem

    def shown() -> Table:
        rows, shared, problem = look()
        return table(rows, f"{experiment.name}, {time.strftime('%Y-%m-%d %H:%M:%S')}", shared, problem)

    if args.once:
        if args.json:
            rows, _, problem = look()
            lines = "\n".join(json.dumps(row.__dict__) for row in rows)
            Console().out(lines, highlight=False)  # not print: the reader of a pipe may end before us, as `head` does
            if problem:
                print(problem, file=sys.stderr)
        else:
            wide = None if sys.stdout.isatty() else 160  # into a file or a pipe: nothing is cut off
            Console(width=wide).print(shown())
        return 0
    try:
        with Live(shown(), auto_refresh=False, screen=False) as live:
            while True:
                time.sleep(args.every)
                live.update(shown(), refresh=True)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
