"""The report's other tables: runs, serving, data, tokens, config differences and provenance, as plain rows of text."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dayzero.nested import flatten
from dayzero.reporting.collect import RUN_STAGES, Run
from dayzero.reporting.scores import DASH, run_facts


@dataclass(frozen=True)
class Table:
    """A header and rows of text; `numeric` columns are set flush right."""

    header: list[str]
    rows: list[list[str]]
    numeric: frozenset[int] = field(default_factory=frozenset)


def runs_table(runs: Sequence[Run]) -> Table:
    """What each run is and what its training took."""
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("model", lambda f: short_source(f["model"])),
        ("method", lambda f: f["method"]),
        ("seed", lambda f: str(f["seed"])),
        ("parameters", lambda f: count(f["parameters"])),
        ("trainable", lambda f: count(f["trainable_parameters"])),
        ("steps", lambda f: number(f["steps"])),
        ("tokens", lambda f: count(f["train_tokens"])),
        ("loss", lambda f: number(f["train_loss"], 3)),
        ("validation loss", lambda f: number(f["validation_loss"], 3)),
        ("tokens/s", lambda f: number(f["tokens_per_second"], 0)),
        ("peak GiB", lambda f: number(f["peak_memory_gib"], 2)),
        ("time", lambda f: duration(f["train_seconds"])),
    ]
    rows = []
    for run in runs:
        facts = run_facts(run)
        rows.append([run.name, *(text(facts) for _, text in columns)])
    return Table(["run", *(name for name, _ in columns)], rows, frozenset(range(3, len(columns) + 1)))


def serving_table(runs: Sequence[Run]) -> Table:
    """vLLM against transformers on each exported model, and the exported model against the one in training."""
    header = ["run", "verdict", "prompts", "tokens compared", "mismatches", "max Δ log-prob", "tolerance", "dtype"]
    header += ["vLLM", "transformers", "max Δ logit after export"]
    rows = []
    for run in runs:
        parity = run.parity or {}
        reload = (run.export or {}).get("reload") or {}
        rows.append(
            [
                run.name,
                text(parity.get("verdict")),
                number(parity.get("num_prompts")),
                number(parity.get("tokens_compared")),
                number(parity.get("token_mismatches")),
                scientific(parity.get("max_logprob_difference")),
                scientific(parity.get("tolerance")),
                text(parity.get("dtype")),
                text(parity.get("vllm")),
                text(parity.get("transformers")),
                scientific(reload.get("max_logit_difference")),
            ]
        )
    return Table(header, rows, frozenset({2, 3, 4, 5, 6, 10}))


def data_tables(runs: Sequence[Run]) -> list[tuple[str, Table, Table]]:
    """(title, sources, facts) for each data set of the runs; facts: splits, dropped rows, the overlap check."""
    tables = []
    for key, users in by_key(runs, "fetch_data").items():
        data = users[0].data
        if data is None:
            continue
        sources = [
            [
                text(source.get("source")),
                number(source.get("rows")),
                text(source.get("licence")),
                text(source.get("revision")),
                (source.get("sha256") or DASH)[:12],
            ]
            for source in data.get("sources") or []
        ]
        facts = [["format", text(data.get("source_format") or data.get("format"))]]
        for split, entry in (data.get("splits") or {}).items():
            questions = f", {number(entry['questions'])} different questions" if entry.get("questions") else ""
            facts.append([f"split {split}", f"{number(entry.get('rows'))} rows{questions}"])
        facts.extend([f"dropped: {words(reason)}", number(n)] for reason, n in (data.get("dropped") or {}).items())
        if rejected := data.get("rejected"):
            files = [f"{name}: {number(n)}" for name, n in (rejected.get("by_file") or {}).items()]
            said = f"{number(rejected.get('rows'))} rows" + (f" ({', '.join(files)})" if files else "")
            facts.append(["set aside in rejected.jsonl", said])
        facts.extend([f"overlap: {words(name)}", text(value)] for name, value in (data.get("overlap") or {}).items())
        header = ["source", "rows read", "licence", "revision", "sha256"]
        tables.append((used_by(key, users, runs), Table(header, sources, frozenset({1})), Table(["", ""], facts)))
    return tables


def tokens_table(runs: Sequence[Run]) -> Table:
    """Every tokenised split: counts, what was dropped or cut, packing efficiency."""
    header = ["tokens", "split", "row length", "packed", "rows", "documents", "tokens", "label tokens"]
    header += ["supervised", "dropped", "truncated", "split up", "filled", "with control-token text"]
    header += ["reasoning left out"]
    rows = []
    for key, users in by_key(runs, "tokenize").items():
        tokens = users[0].tokens
        if tokens is None:
            continue
        for split, entry in (tokens.get("splits") or {}).items():
            efficiency = entry.get("packing_efficiency")
            rows.append(
                [
                    used_by(key, users, runs),
                    split,
                    number(tokens.get("seq_len")),
                    text(tokens.get("packing")),
                    number(entry.get("rows")),
                    number(entry.get("documents")),
                    number(entry.get("tokens")),
                    number(entry.get("label_tokens")),
                    _percent(entry.get("label_tokens"), entry.get("tokens")),
                    _dropped(entry.get("dropped")),
                    number(entry.get("truncated")),
                    number(entry.get("split")),
                    DASH if efficiency is None else f"{100 * efficiency:.1f} %",
                    number(entry.get("special_token_text")),
                    number(entry.get("reasoning_left_out")),
                ]
            )
    return Table(header, rows, frozenset({2, *range(4, 15)}))


def differences_table(runs: Sequence[Run]) -> Table:
    """Every config key whose value is not the same in all runs."""
    flat = [
        {key: json.dumps(value, ensure_ascii=False).strip('"') for key, value in flatten(run.config).items()}
        for run in runs
    ]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = []
    for key in keys:
        values = [config.get(key, DASH) for config in flat]
        if key != "run" and len(set(values)) > 1:
            rows.append([key, *values])
    return Table(["key", *(run.name for run in runs)], rows)


def provenance_tables(runs: Sequence[Run]) -> list[tuple[str, Table]]:
    """(run, table) of where and when each stage of a run was executed."""
    header = ["stage", "started (UTC)", "time", "peak memory", "cores", "machine", "commit"]
    tables = []
    for run in runs:
        rows = []
        for stage, record in run.stages():
            made = record.get("provenance") or {}
            hardware = made.get("hardware") or {}
            git = made.get("git") or {}
            commit = (git.get("commit") or DASH)[:10] + (" + changes" if git.get("dirty") else "")
            started = (made.get("started") or DASH).replace("T", " ").removesuffix("+00:00")
            seconds, memory = made.get("seconds"), made.get("peak_memory_gib")
            machine = " + ".join([text(hardware.get("cpu")), *hardware.get("gpus", [])])
            cores = number(hardware.get("cores"))
            rows.append([stage, started, duration(seconds), unit(memory, "GiB", 2), cores, machine, commit])
        tables.append((run.name, Table(header, rows, frozenset({2, 3, 4}))))
    return tables


def packages_table(runs: Sequence[Run]) -> Table:
    """Versions of the packages that decide results; more than one in a cell: not all stages had the same."""
    versions: dict[str, dict[str, None]] = {}
    for run in runs:
        for _, record in run.stages():
            made = record.get("provenance") or {}
            found = {"dayzero": made.get("dayzero"), "python": made.get("python"), **(made.get("packages") or {})}
            for package, version in found.items():
                if version:
                    versions.setdefault(package, {})[version] = None
    return Table(["package", "version"], [[name, ", ".join(found)] for name, found in sorted(versions.items())])


def stage_seconds(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Bar -> stage -> seconds: one bar for what the runs share (each key counted once) and one for each run."""
    bars: dict[str, dict[str, float]] = {"shared": {}}
    seen: set[tuple[str, str]] = set()
    for run in runs:
        own = bars.setdefault(run.name, {})
        for stage, record in run.stages():
            seconds = (record.get("provenance") or {}).get("seconds")
            if seconds is None:
                continue
            if stage in RUN_STAGES:
                own[stage] = seconds
            elif (stage, run.keys[stage]) not in seen:
                seen.add((stage, run.keys[stage]))
                bars["shared"][stage] = bars["shared"].get(stage, 0) + seconds
    return {bar: stages for bar, stages in bars.items() if stages}


def stage_memory(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Run -> stage -> peak memory in GiB; for training what the ranks measured, else the process's."""
    memory: dict[str, dict[str, float]] = {}
    for run in runs:
        for stage in RUN_STAGES:
            record = getattr(run, RUN_STAGES[stage]) or {}
            peak = (record.get("provenance") or {}).get("peak_memory_gib")
            if stage == "train" and record.get("peak_memory_gib") is not None:
                peak = record["peak_memory_gib"]
            if peak is not None:
                memory.setdefault(run.name, {})[stage] = peak
    return memory


def number(value: float | None, decimals: int | None = None) -> str:
    """A number with thousands separated; the dash for None."""
    if value is None:
        return DASH
    return f"{value:,}" if decimals is None else f"{value:,.{decimals}f}"


def count(value: float | None) -> str:
    """A large count with a unit: 1.23 M."""
    if value is None:
        return DASH
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,}"


def unit(value: float | None, name: str, decimals: int) -> str:
    """A number and its unit."""
    return DASH if value is None else f"{value:,.{decimals}f} {name}"


def duration(seconds: float | None) -> str:
    """Seconds as 42 s, 3 min 05 s or 2 h 07 min."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours:,} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def scientific(value: float | None) -> str:
    """A small difference: 4.8e-06."""
    return DASH if value is None else "0" if value == 0 else f"{value:.1e}"


def text(value: Any) -> str:
    """Any JSON value as one text; the dash for None."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else number(value) if isinstance(value, int | float) else json.dumps(value)


def words(key: str) -> str:
    """A JSON key as words."""
    return key.replace("_", " ")


def short_source(source: str) -> str:
    """The last part of a source, which is what tells one from another."""
    if source.startswith("hf:"):
        return source.removeprefix("hf:").partition("@")[0]
    return source.rstrip("/").rpartition("/")[2].removesuffix(".gguf")


def _percent(part: float | None, whole: float | None) -> str:
    return DASH if part is None or not whole else f"{100 * part / whole:.1f} %"


def _dropped(dropped: dict[str, int] | int | None) -> str:
    if isinstance(dropped, dict):
        return ", ".join(f"{number(n)} {words(why)}" for why, n in dropped.items() if n) or "0"
    return number(dropped)


def by_key(runs: Sequence[Run], stage: str) -> dict[str, list[Run]]:
    """The runs that share each key of a stage of the store."""
    users: dict[str, list[Run]] = {}
    for run in runs:
        if stage in run.keys:
            users.setdefault(run.keys[stage], []).append(run)
    return users


def used_by(key: str, users: Sequence[Run], runs: Sequence[Run]) -> str:
    """A key of the store, and the runs that use it where not all do."""
    return key if len(users) == len(runs) else f"{key} ({', '.join(run.name for run in users)})"
