"""docs/model-coverage.md and its machine-readable twin, and what got worse since the twin was written."""

from __future__ import annotations

from collections import Counter
from datetime import date
from importlib.metadata import version
from typing import Any

from tests.coverage.checks import CHECKS

COLUMNS = ["build", *CHECKS]
CORE = ["full", "lora", "loss", "export", "resume"]
"""What an architecture must pass to count as supported."""

SIGNS = {"pass": "✓", "padded": "padded", "refused": "no", "fail": "✗", "upstream": "✗ (upstream)", "missing": ""}

Results = dict[str, dict[str, dict[str, str]]]
"""model_type -> check -> {status, why}."""


def state(cell: dict[str, str] | None) -> str:
    """A key of SIGNS: the status, or `padded` where documents of a row would see one another and the probe said so."""
    if cell is None:
        return "missing"
    return "padded" if cell["status"] == "pass" and cell["why"].startswith("padded") else cell["status"]


def worse(results: Results, baseline: Results) -> list[str]:
    """A line for each cell that passed in `baseline` and does not now, and for each architecture that is gone."""
    found = [f"{name}: in the table before, not tried now" for name in baseline if name not in results]
    for name, cells in results.items():
        for check, old in baseline.get(name, {}).items():
            now = cells.get(check)
            if old["status"] == "pass" and state(now) not in ("pass", state(old)):
                found.append(f"{name}, {check}: {state(old)} before, now {state(now)}: {(now or {}).get('why', '')}")
    return found


def twin(results: Results) -> dict[str, Any]:
    """What docs/model-coverage.json holds."""
    return {"date": date.today().isoformat(), "versions": versions(), "architectures": results}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "peft")}


def share(results: Results, columns: list[str]) -> tuple[int, int]:
    """(architectures that pass all `columns`, all architectures)."""
    return sum(all(state(c.get(k)) in ("pass", "padded") for k in columns) for c in results.values()), len(results)


def page(results: Results, classes: dict[str, str]) -> str:
    """The Markdown page. `classes`: model_type -> class name."""
    good, total = share(results, CORE)
    said = ", ".join(f"{name} {number}" for name, number in versions().items())
    lines = [
        "# Which architectures train",
        "",
        "Every decoder-only text architecture in the causal-LM mapping of the installed transformers, as a tiny model",
        "with random weights made from the architecture's own default config, through the engine on two ranks (FSDP2,",
        "gloo, CPU). Left out are encoder-decoders, encoders that the mapping of masked LMs has too, and models of",
        "several kinds of input, whose text part has a row of its own. transformer-engine (`train.fp8.backend`) is in",
        "no column: it cannot be installed without CUDA, and is exercised by a test double of the package only.",
        "",
        f"Printed by `make coverage` on {date.today().isoformat()} with {said}; the same,",
        "for machines, in `model-coverage.json`: the command fails when a cell that passed there does not any more.",
        "",
        f"**{good} of {total} ({100 * good / total:.1f} %) pass {', '.join(CORE)}.**",
        "",
        "| column | what is done | passes | refused | fails |",
        "|---|---|---|---|---|",
    ]
    for column in COLUMNS:
        counts = Counter(state(cells.get(column)) for cells in results.values())
        padded = f" + {counts['padded']} padded" if counts["padded"] else ""
        fails = counts["fail"] + counts["upstream"] + counts["missing"]
        lines.append(f"| {column} | {DONE[column]} | {counts['pass']}{padded} | {counts['refused']} | {fails} |")
    lines += [
        "",
        "✓ passes; no: refused in one line before training, with the reason below; ✗ fails; ✗ (upstream) fails in",
        "transformers alone too; padded: documents in one row would see one another, which the check at load finds, so",
        "that the run trains on one document a row.",
        "",
        "| model_type | class | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for name, cells in sorted(results.items()):
        signs = " | ".join(SIGNS[state(cells.get(column))] for column in COLUMNS)
        lines.append(f"| {name} | {classes.get(name, '')} | {signs} |")
    lines += ["", "## Reasons", "", "Each is said once, for the first of the columns that it explains.", ""]
    for name, cells in sorted(results.items()):
        said_before: set[str] = set()
        for column in COLUMNS:
            cell = cells.get(column)
            if cell and cell["why"] and cell["why"] not in said_before:
                said_before.add(cell["why"])
                lines.append(f"- {name}, {column}: {_plain(cell['why'])}")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


DONE = {
    "build": "a tiny model of its own config, forward and backward pass, `save_pretrained`",
    "full": "four steps of all weights; the loss falls",
    "loss": "loss (1e-4) and gradient norm (1e-3) of the first step, padded rows and chunked loss, against the model's "
    "own logits of each document alone in one process",
    "lora": "two steps of `all-linear` adapters from the base model's loss; frozen weights stay the same to the bit",
    "merge": "adapters merged, exported and reloaded by transformers: weights the same to the bit, logits of training "
    "within 1e-5",
    "packing": "four documents in a row against each alone (1e-4 of the largest logit)",
    "bf16": "two steps in bfloat16; first loss within 5 %",
    "checkpointing": "a step with activation checkpointing: loss and gradient norm",
    "export": "trained weights exported and reloaded by transformers: weights the same to the bit, logits of training "
    "within 1e-5",
    "resume": "continued from the middle: the same losses and weights to the bit",
    "tp": "a step over tp 2, by the model's plan or a derived one: loss and gradient norm",
}
