"""Scores of all runs: the tidy frame behind results.csv and the table of runs by metrics made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dayzero.reporting.collect import Run

DASH = "\N{EN DASH}"
MAX_DECIMALS = 3

SCORE_COLUMNS = [
    "experiment",
    "run",
    "task",
    "task_version",
    "num_fewshot",
    "metric",
    "value",
    "stderr",
    "n",
    "higher_is_better",
    "items_sha256",
    "truncated_share",
]


def tidy_scores(experiment: str, runs: Sequence[Run]) -> pd.DataFrame:
    """One row for each run x task x metric (one with an empty task for a run without scores), with the run's facts."""
    rows = []
    for run in runs:
        facts = run_facts(run)
        scored = False
        for task, result in ((run.evaluation or {}).get("tasks") or {}).items():
            for metric, score in result["metrics"].items():
                scored = True
                values = {
                    "experiment": experiment,
                    "run": run.name,
                    "task": task,
                    "task_version": result.get("version"),
                    "num_fewshot": result.get("num_fewshot"),
                    "metric": metric,
                    "value": score["value"],
                    "stderr": score.get("stderr"),
                    "n": result.get("num_items"),
                    "higher_is_better": score.get("higher_is_better"),
                    "items_sha256": result.get("items_sha256"),
                    "truncated_share": result.get("truncated_share"),
                }
                rows.append({**values, **facts})
        if not scored:
            rows.append({"experiment": experiment, "run": run.name, **facts})
    facts_columns = list(run_facts(runs[0])) if runs else []
    frame = pd.DataFrame(rows, columns=[*SCORE_COLUMNS, *facts_columns])
    whole_numbers = [
        "num_fewshot",
        "n",
        "seed",
        "steps",
        "train_tokens",
        "trainable_parameters",
        "parameters",
        "world_size",
    ]
    types = {
        **dict.fromkeys(["value", "stderr", "truncated_share"], "float64"),
        **dict.fromkeys(whole_numbers, "Int64"),
    }
    return frame.astype({column: dtype for column, dtype in types.items() if column in frame})


def run_facts(run: Run) -> dict[str, Any]:
    """What else one wants to know of a run beside its scores; None where a stage does not exist."""
    train, export, parity = run.train or {}, run.export or {}, run.parity or {}
    return {
        "model": run.model,
        "method": run.method,
        "seed": run.config["seed"],
        "parameters": export.get("num_parameters"),
        "trainable_parameters": train.get("trainable_parameters"),
        "steps": train.get("steps"),
        "train_tokens": train.get("num_tokens"),
        "train_loss": train.get("loss"),
        "validation_loss": train.get("validation_loss"),
        "tokens_per_second": train.get("tokens_per_second"),
        "peak_memory_gib": train.get("peak_memory_gib"),
        "train_seconds": train.get("seconds"),
        "world_size": train.get("world_size"),
        "serving_verdict": parity.get("verdict"),
    }


@dataclass(frozen=True)
class Cell:
    """A value as it is shown; the dash where the run has none."""

    value: str
    stderr: str | None = None
    best: bool = False
    comparable: bool = True
    """False: computed on other held-out items than the first run's."""

    @property
    def text(self) -> str:
        """Value ± standard error."""
        return self.value if self.stderr is None else f"{self.value} ± {self.stderr}"


@dataclass(frozen=True)
class Column:
    """One task's metric."""

    task: str
    metric: str
    higher_is_better: bool | None
    cells: list[Cell]
    """In the order of the table's runs."""

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return {True: "↑", False: "↓"}.get(self.higher_is_better, "")  # type: ignore[arg-type]


@dataclass(frozen=True)
class ScoreTable:
    """Runs as rows, tasks' metrics as columns."""

    runs: list[str]
    columns: list[Column]
    tasks: dict[str, str]
    """Task -> its label: few-shot examples and number of items."""
    incomparable: list[str]
    """One sentence for each task that the runs were not given with the same items."""
    unrecorded: list[str]
    """Tasks without the checksum of their items, which cannot be compared so (groups of tasks have none)."""
    truncated: list[str]
    """One sentence for each run and task with answers cut at the length limit."""

    def task_spans(self) -> list[tuple[str, int]]:
        """(task, number of its columns) in the columns' order."""
        names = [column.task for column in self.columns]
        return [(task, names.count(task)) for task in dict.fromkeys(names)]


def score_table(scores: pd.DataFrame) -> ScoreTable:
    """The table of the frame of `tidy_scores` (or of results.csv read back)."""
    runs = list(dict.fromkeys(scores["run"]))
    scored = scores[scores["task"].notna()]
    columns, tasks, incomparable, unrecorded, truncated = [], {}, [], [], []
    for task in dict.fromkeys(scored["task"]):
        of_task = scored[scored["task"] == task]
        different = _different_items(of_task)
        tasks[task] = _task_label(of_task)
        if of_task["items_sha256"].isna().any():
            unrecorded.append(task)
        for run, share in of_task.groupby("run", sort=False)["truncated_share"].first().items():
            if share > 0:
                truncated.append(f"{task}: {share:.1%} of the answers of {run} were cut at the length limit.")
        if different:
            first = of_task["run"].iloc[0]
            incomparable.append(f"{task}: {', '.join(different)} not on the same items as {first}: not comparable.")
        for metric in dict.fromkeys(of_task["metric"]):
            rows = of_task[of_task["metric"] == metric].set_index("run")
            better = rows["higher_is_better"].dropna()
            higher = bool(better.iloc[0]) if len(better) else None
            columns.append(Column(task, metric, higher, _cells(rows, runs, different, higher)))
    return ScoreTable(runs, columns, tasks, incomparable, unrecorded, truncated)


def _different_items(of_task: pd.DataFrame) -> list[str]:
    """Runs whose items differ from those of the first run that has the task."""
    items = of_task.groupby("run", sort=False)["items_sha256"].first()
    sizes = of_task.groupby("run", sort=False)["n"].first()
    same = [
        (h == items.iloc[0] or pd.isna(h) or pd.isna(items.iloc[0])) and n == sizes.iloc[0]
        for h, n in zip(items, sizes, strict=True)
    ]
    return [str(run) for run, is_same in zip(items.index, same, strict=True) if not is_same]


def _task_label(of_task: pd.DataFrame) -> str:
    shots = sorted(set(of_task["num_fewshot"].dropna().astype(int)))
    sizes = sorted(set(of_task["n"].dropna().astype(int)))
    parts = ["/".join(map(str, shots)) + "-shot"] if shots else []
    if sizes:
        parts.append("n = " + "/".join(f"{n:,}" for n in sizes))
    return " · ".join(parts)


def _cells(rows: pd.DataFrame, runs: list[str], different: list[str], higher: bool | None) -> list[Cell]:
    decimals = _decimals(rows["value"], rows["stderr"])
    values = rows["value"].dropna()
    best = None
    if higher is not None and len(values) > 1 and not different:
        best = values.max() if higher else values.min()
    cells = []
    for run in runs:
        if run not in rows.index or pd.isna(rows["value"][run]):
            cells.append(Cell(DASH))
            continue
        value, stderr = rows["value"][run], rows["stderr"][run]
        is_best = best is not None and value == best
        error = None if pd.isna(stderr) else f"{stderr:.{decimals}f}"
        cells.append(Cell(f"{value:.{decimals}f}", error, best=is_best, comparable=run not in different))
    return cells


def _decimals(values: pd.Series, stderrs: pd.Series) -> int:
    """Two digits of the smallest standard error, at least one and at most MAX_DECIMALS; without one, by size."""
    positive = [s for s in stderrs.dropna() if s > 0]
    if positive:
        return min(MAX_DECIMALS, max(1, 1 - math.floor(math.log10(min(positive)))))
    largest = max((abs(v) for v in values.dropna()), default=0)
    return 3 if largest < 10 else 1
