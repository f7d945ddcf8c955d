"""Where everything lies under results/, and the keys by which runs share data, models and tokens.

A key is a readable name plus a short hash of exactly what the files depend on, so a sweep pays for them once and two
experiments share them. The part of a config that a key is made of (its "spec") is all that the making stage may read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dayzero.config import Data, RunConfig, Tokenize
from dayzero.files import sha256_json

FORMAT = 2
"""Raised when the files of the store change their meaning, so that old ones are not taken for new ones."""

RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"


NOT_ROWS = {"streaming", "weights"}
"""Keys of `data` that change how rows travel or how often they are drawn, never which rows there are."""
ADDED = {
    "data": ("template", "on_bad_row"),
    "tokenize": ("loss_turns", "loss_roles", "loss_parts", "loss_reasoning", "special_text"),
}
"""Keys that came later: left out of a spec at their default, so that what was made before them is found again."""


def data_section(data: Data) -> dict[str, Any]:
    """The part of `data` that decides its rows."""
    return _section("data", data, NOT_ROWS)


def data_spec(run: RunConfig) -> dict[str, Any]:
    """What the normalised splits of `store/data/{key}` depend on."""
    return {"data": data_section(run.data)}


def model_spec(run: RunConfig) -> dict[str, Any]:
    """What the HF directory of `store/models/{key}` depends on."""
    return {"model": run.model.model_dump(mode="json", exclude={"architecture", "tokenizer", "chat_template"})}


def tokenizer_spec(run: RunConfig) -> dict[str, Any]:
    """What a trained tokenizer in `store/tokenizers/{key}` depends on."""
    return {**data_spec(run), "model": run.model.model_dump(mode="json", include={"tokenizer"})}


def tokens_spec(run: RunConfig) -> dict[str, Any]:
    """What the token rows of `store/tokens/{key}` depend on."""
    tokenizer = tokenizer_spec(run) if run.model.tokenizer else model_spec(run)
    spec = {**data_spec(run), **tokenizer, "tokenize": _section("tokenize", run.tokenize)}
    if run.data.weights is not None:
        spec["by_source"] = True  # rows of one source each, for the loader to draw from
    spec["model"] = {**spec["model"], "chat_template": run.model.chat_template}
    return spec


def check_spec(run: RunConfig) -> dict[str, Any]:
    """What the data report of `store/checks/{key}` depends on."""
    return {
        **data_spec(run),
        "data_check": run.data_check.model_dump(mode="json"),
        "tasks": [*run.evaluate.tasks, *run.evaluate.extra_tasks],
    }


def data_key(run: RunConfig) -> str:
    return _key(_first(run.data.source), data_spec(run))


def model_key(run: RunConfig) -> str:
    return _key(run.model.source, model_spec(run))


def tokenizer_key(run: RunConfig) -> str:
    return _key(_first(run.data.source), tokenizer_spec(run))


def tokens_key(run: RunConfig) -> str:
    return _key(_first(run.data.source), tokens_spec(run))


def check_key(run: RunConfig) -> str:
    return _key(_first(run.data.source), check_spec(run))


_WEIGHTS = ["experiment", "run", "seed", "model", "data", "tokenize", "method", "train", "parallelism"]
STAGE_SECTIONS = {
    "train": _WEIGHTS,
    "export": [*_WEIGHTS, "export"],
    "evaluate": ["evaluate"],
    "verify_serving": ["serving"],
}
"""The sections of a run's config that a stage is given; changing another one does not rerun it."""


def stage_config(run: RunConfig, stage: str) -> dict[str, Any]:
    """The part of a run's config that decides what `stage` makes of its input files: all that its job is given."""
    config = run.resolved()
    sections = STAGE_SECTIONS[stage]
    if run.method.name == "none" and stage == "export":  # the untouched model: nothing of data and training is in it
        sections = ["experiment", "run", "model", "method", "export"]
    config["method"] = run.method.used()
    config["data"].pop("streaming")
    given = {section: config[section] for section in sections}
    if run.model.trust_remote_code and "model" not in given:  # whoever loads the model must be allowed its code
        given["model"] = {"trust_remote_code": True}
    return given


def with_teacher(run: RunConfig) -> RunConfig | None:
    """`run` with its teacher for a model, which is fetched like any other; None without one, or where it is a run's."""
    if run.method.name != "kd":
        return None
    none = {"sha256": None, "dtype": None, "architecture": None, "tokenizer": None, "chat_template": None}
    model = run.model.model_copy(update={"source": run.method.kd.teacher, **none})
    return run.model_copy(update={"model": model})


def _section(name: str, section: Data | Tokenize, without: set[str] | None = None) -> dict[str, Any]:
    values = section.model_dump(mode="json", exclude=without)
    defaults = type(section)().model_dump(mode="json")
    return {k: v for k, v in values.items() if k not in ADDED[name] or v != defaults[k]}


def _first(source: str | list[str] | None) -> str | None:
    return source[0] if isinstance(source, list) else source


def _key(source: str | None, spec: dict[str, Any]) -> str:
    name = Path((source or "none").partition("@")[0] if (source or "").startswith("hf:") else source or "none").name
    name = re.sub(r"\.(gguf|jsonl?|csv|parquet|txt|gz|zst)", "", name, flags=re.IGNORECASE)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:40] or "source"
    return f"{slug}-{sha256_json({'format': FORMAT, **spec})[:10]}"
