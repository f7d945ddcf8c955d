"""The report's plots: loss, scores, throughput, memory, time by stage; each draws one figure of what was read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from dayzero.reporting.collect import RUN_STAGES, SHARED_STAGES, Run
from dayzero.reporting.facts import by_key, stage_memory, stage_seconds
from dayzero.reporting.style import COLOURS, INK, MUTED, WIDTH, series_style

STAGE_COLOURS = [*COLOURS, MUTED, INK]
"""One for each stage of RUN_STAGES and SHARED_STAGES."""
LANGUAGES = 8
"""The most frequent languages of a data set that are drawn."""
WRAPPED = 18
"""Letters in a line of a task's name."""
LOG_SCALE_FROM = 20
"""Losses whose largest is this many times the smallest are drawn on a logarithmic axis."""


def loss_plot(runs: Sequence[Run], scores: pd.DataFrame) -> Figure:
    """Training loss of every trained run as a line, validation loss as marks on a thin line of the same colour."""
    figure, axes = _figure(3.5)
    losses: list[float] = []
    for index, run in enumerate(runs):
        if run.metrics is None:
            continue
        colour, marker, line = series_style(index)
        axes.plot(run.metrics["step"], run.metrics["loss"], color=colour, linestyle=line, label=run.name)
        losses.extend(run.metrics["loss"].dropna())
        if "validation_loss" in run.metrics:
            validated = run.metrics.dropna(subset=["validation_loss"])
            axes.plot(
                validated["step"], validated["validation_loss"], color=colour, linestyle=":", linewidth=1, marker=marker
            )
            losses.extend(validated["validation_loss"])
    if not losses:
        return _nothing(axes, "No run was trained")
    if min(losses) > 0 and max(losses) / min(losses) > LOG_SCALE_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel="step", ylabel="loss per label token")
    axes.margins(x=0.02)
    handles, labels = axes.get_legend_handles_labels()
    handles.append(Line2D([], [], color=MUTED, linestyle=":", linewidth=1, marker="o"))
    _legend(figure, handles, [*labels, "validation"])
    return figure


def scores_plot(runs: Sequence[Run], scores: pd.DataFrame) -> Figure:
    """One panel a metric, metrics of the same tasks side by side: tasks down, runs as marks with one standard error to
    each side."""
    scored = scores[scores["task"].notna()]
    groups: dict[tuple[str, ...], list[str]] = {}
    for metric, of_metric in scored.groupby("metric", sort=False):
        groups.setdefault(tuple(dict.fromkeys(of_metric["task"])), []).append(str(metric))
    if not groups:
        return _nothing(_figure(1.6)[1], "No run was evaluated")
    columns = 2 if scored["metric"].nunique() > 1 else 1
    rows = [
        (tasks, metrics[i : i + columns]) for tasks, metrics in groups.items() for i in range(0, len(metrics), columns)
    ]
    heights = [0.75 + len(tasks) * max(0.45, 0.14 * len(runs)) for tasks, _ in rows]
    figure = Figure(figsize=(WIDTH, 0.45 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(rows), columns, sharey="row", squeeze=False, height_ratios=heights)
    names = [run.name for run in runs]
    for (tasks, metrics), row in zip(rows, panels, strict=True):
        for panel, metric in zip(row, metrics, strict=False):
            _scores_of(panel, scored[scored["metric"] == metric], tasks, names)
        for panel in row[len(metrics) :]:
            panel.set_axis_off()
    seen = [index for index, name in enumerate(names) if name in set(scored["run"])]
    handles = [Line2D([], [], color=series_style(i)[0], marker=series_style(i)[1], linestyle="") for i in seen]
    _legend(figure, handles, [names[i] for i in seen])
    return figure


def _scores_of(panel: Axes, of_metric: pd.DataFrame, tasks: Sequence[str], names: Sequence[str]) -> None:
    """Draw one metric's values: a line of the panel a task, a mark a run."""
    step = 0.6 / max(1, len(names) - 1) if len(names) > 1 else 0.0
    for index, name in enumerate(names):
        colour, marker, _ = series_style(index)
        of_run = of_metric[of_metric["run"] == name]
        if of_run.empty:
            continue
        places = [tasks.index(task) + (index - (len(names) - 1) / 2) * step for task in of_run["task"]]
        stderr = of_run["stderr"].astype(float).fillna(0)
        panel.errorbar(
            of_run["value"], places, xerr=stderr, fmt=marker, color=colour, capsize=2.5, elinewidth=1.2, label=name
        )
    better = of_metric["higher_is_better"].dropna()
    arrow = "" if better.empty else " ↑" if better.iloc[0] else " ↓"
    panel.set_title(_short(str(of_metric["metric"].iloc[0])) + arrow)
    panel.set_yticks(range(len(tasks)), [_wrap(task) for task in tasks])
    panel.set_ylim(len(tasks) - 0.45, -0.55)
    panel.grid(visible=False, axis="y")
    panel.tick_params(axis="y", length=0)
    panel.margins(x=0.08)


def throughput_plot(runs: Sequence[Run], scores: pd.DataFrame) -> Figure:
    """Tokens per second of every step, and their median as a thin line."""
    figure, axes = _figure(3.2)
    drawn = False
    for index, run in enumerate(runs):
        if run.metrics is None or "tokens_per_second" not in run.metrics:
            continue
        drawn = True
        colour, _, line = series_style(index)
        axes.plot(run.metrics["step"], run.metrics["tokens_per_second"], color=colour, linestyle=line, label=run.name)
        axes.axhline(run.metrics["tokens_per_second"].median(), color=colour, linewidth=0.8, linestyle=":")
    if not drawn:
        return _nothing(axes, "No run was trained")
    axes.set(xlabel="step", ylabel="tokens/s")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    handles, labels = axes.get_legend_handles_labels()
    _legend(figure, [*handles, Line2D([], [], color=MUTED, linewidth=0.8, linestyle=":")], [*labels, "median"])
    return figure


def memory_plot(runs: Sequence[Run], scores: pd.DataFrame) -> Figure:
    """Peak memory of every stage of every run."""
    memory = stage_memory(runs)
    figure, axes = _figure(0.9 + 0.36 * max(2, len(memory)))
    if not memory:
        return _nothing(axes, "No stage recorded its memory")
    stages = [stage for stage in RUN_STAGES if any(stage in of_run for of_run in memory.values())]
    for index, stage in enumerate(stages):
        colour, marker, _ = series_style(index)
        points = [(of_run[stage], place) for place, of_run in enumerate(memory.values()) if stage in of_run]
        axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=6, label=_stage(stage))
    _bars_axis(axes, list(memory), "peak memory (GiB)")
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


def stage_time_plot(runs: Sequence[Run], scores: pd.DataFrame) -> Figure:
    """Time of every stage: one bar for what the runs share, one for each run."""
    bars = stage_seconds(runs)
    figure, axes = _figure(0.9 + 0.36 * max(2, len(bars)))
    if not bars:
        return _nothing(axes, "No stage recorded its time")
    longest = max(sum(stages.values()) for stages in bars.values())
    scale, unit = (3600, "hours") if longest > 2 * 3600 else (60, "minutes") if longest > 120 else (1, "seconds")
    left = dict.fromkeys(bars, 0.0)
    for index, stage in enumerate([*RUN_STAGES, *SHARED_STAGES]):
        places = [place for place, stages in enumerate(bars.values()) if stage in stages]
        if not places:
            continue
        names = [list(bars)[place] for place in places]
        widths = [bars[name][stage] / scale for name in names]
        starts = [left[name] for name in names]
        axes.barh(places, widths, 0.62, left=starts, color=STAGE_COLOURS[index], label=_stage(stage))
        for name, width in zip(names, widths, strict=True):
            left[name] += width
    _bars_axis(axes, list(bars), f"time ({unit})")
    axes.set_xlim(left=0)
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


def document_lengths_plot(runs: Sequence[Run], scores: pd.DataFrame) -> Figure:
    """How many of the training documents have how many tokens, and where the rows end."""
    figure, axes = _figure(3.2)
    lines = 0
    for key, users in by_key(runs, "tokenize").items():
        tokens = users[0].tokens or {}
        histogram = ((tokens.get("splits") or {}).get("train") or {}).get("document_tokens")
        if not histogram:
            continue
        colour, _, line = series_style(lines)
        counts = histogram["counts"]
        edges = [0.5, *(2**i for i in range(len(counts)))]
        share = [100 * n / max(sum(counts), 1) for n in counts]
        axes.stairs(share, edges, color=colour, linestyle=line, linewidth=1.5, label=key)
        axes.axvline(tokens["seq_len"], color=colour, linestyle=":", linewidth=1)
        lines += 1
    if not lines:
        return _nothing(axes, "No lengths were recorded")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="tokens of a document (dotted: row length)", ylabel="% of training documents")
    axes.set_ylim(bottom=0)
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


def label_share_plot(runs: Sequence[Run], scores: pd.DataFrame) -> Figure:
    """The share of the tokens that is supervised, by tokenised split."""
    names, shares = [], []
    for key, users in by_key(runs, "tokenize").items():
        for split, entry in ((users[0].tokens or {}).get("splits") or {}).items():
            if entry.get("tokens"):
                names.append(f"{key} {split}")
                shares.append(100 * entry["label_tokens"] / entry["tokens"])
    figure, axes = _figure(0.9 + 0.3 * max(2, len(names)))
    if not names:
        return _nothing(axes, "No tokens were counted")
    axes.barh(range(len(names)), shares, 0.62, color=COLOURS[0])
    for place, share in enumerate(shares):
        axes.annotate(f"{share:.1f} %", (share, place), (3, 0), textcoords="offset points", va="center", color=INK)
    _bars_axis(axes, names, "% of the tokens that are supervised")
    axes.set_xlim(0, 112)
    return figure


def languages_plot(runs: Sequence[Run], scores: pd.DataFrame) -> Figure:
    """The languages of the training rows that were looked at."""
    found = {}
    for key, users in by_key(runs, "check_data").items():
        train = ((users[0].check or {}).get("splits") or {}).get("train") or {}
        if train.get("languages"):
            found[key] = train["languages"]
    names = list(dict.fromkeys(name for counts in found.values() for name in list(counts)[:LANGUAGES]))
    figure, axes = _figure(0.9 + 0.3 * max(2, len(names)))
    if not names:
        return _nothing(axes, "No data report was made")
    height = 0.8 / len(found)
    for index, (key, counts) in enumerate(found.items()):
        share = [100 * counts.get(name, 0) / sum(counts.values()) for name in names]
        places = [i + (index - (len(found) - 1) / 2) * height for i in range(len(names))]
        axes.barh(places, share, height, color=series_style(index)[0], label=key)
    _bars_axis(axes, names, "% of the rows looked at")
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


PLOTS: dict[str, tuple[str, Callable[[Sequence[Run], pd.DataFrame], Figure]]] = {
    "loss": ("Loss", loss_plot),
    "scores": ("Scores with standard errors", scores_plot),
    "throughput": ("Training throughput", throughput_plot),
    "memory": ("Peak memory by stage", memory_plot),
    "stage_time": ("Time by stage", stage_time_plot),
    "document_lengths": ("Lengths of the training documents", document_lengths_plot),
    "label_share": ("Share of supervised tokens", label_share_plot),
    "languages": ("Languages of the training rows", languages_plot),
}
"""File name -> (title, drawing)."""


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _nothing(axes: Axes, why: str) -> Figure:
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", color=MUTED, transform=axes.transAxes)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    columns = len(labels) if sum(map(len, labels)) + 5 * len(labels) < 62 else max(1, 46 // (max(map(len, labels)) + 5))
    figure.legend(
        handles,
        [_short(label) for label in labels],
        loc="outside upper left",
        ncols=columns,
        columnspacing=1.4,
        handletextpad=0.5,
    )


def _bars_axis(axes: Axes, names: list[str], label: str) -> None:
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(left=0)
    axes.set_xlabel(label)


def _stage(stage: str) -> str:
    return stage.replace("_", " ")


def _short(name: str, length: int = 28) -> str:
    """A name that leaves room for the plot."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _wrap(task: str) -> str:
    """A long task name over two lines, broken at a separator."""
    task = _short(task, 2 * WRAPPED)
    if len(task) <= WRAPPED:
        return task
    cut = max(task.rfind(c, 0, WRAPPED) for c in "_-/ ")
    return f"{task[: cut + 1]}\n{task[cut + 1 :]}" if cut > 0 else task
