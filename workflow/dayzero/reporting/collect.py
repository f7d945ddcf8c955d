"""Read everything the stages wrote about an experiment's runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dayzero import store
from dayzero.config import RunConfig
from dayzero.errors import DataError
from dayzero.files import json_object, read_json_lines

Record = dict[str, Any]

SHARED_STAGES = {
    "fetch_model": "base_model",
    "fetch_data": "data",
    "check_data": "check",
    "train_tokenizer": "tokenizer",
    "tokenize": "tokens",
}
"""Stages whose files runs share -> the field of `Run` that holds their JSON."""
RUN_STAGES = {"train": "train", "export": "export", "evaluate": "evaluation", "verify_serving": "parity"}
"""Stages of one run -> the field of `Run`."""


@dataclass(frozen=True)
class Run:
    """One run's files. A stage that the run does not have (training, evaluation) is None."""

    name: str
    config: Record
    keys: dict[str, str]
    """Shared stage -> its key in the store."""
    base_model: Record | None
    data: Record | None
    check: Record | None
    tokenizer: Record | None
    tokens: Record | None
    train: Record | None
    metrics: pd.DataFrame | None
    """metrics.jsonl, one row a step in order; None where nothing was trained."""
    export: Record | None
    evaluation: Record | None
    parity: Record | None

    @property
    def method(self) -> str:
        """How the run was trained; `none` for the untouched model."""
        return self.config["method"]["name"]

    @property
    def model(self) -> str:
        """The base model's source, or the architecture that was trained from scratch."""
        model = self.config["model"]
        return model["source"] or f"{(model['architecture'] or {}).get('model_type', 'a model')} from random weights"

    def stages(self) -> Iterator[tuple[str, Record]]:
        """(stage, what it wrote) for every stage this run has, in the order of the workflow."""
        for stage, field in {**SHARED_STAGES, **RUN_STAGES}.items():
            if (record := getattr(self, field)) is not None:
                yield stage, record


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in the order given; each directory is `{results}/{experiment}/{run}` with `{results}/store` beside.

    Raises DataError when a run has no config.json, or a file is not what its stage writes.
    """
    return [read_run(directory) for directory in directories]


def read_run(directory: Path) -> Run:
    """One run from its directory; see `read_runs`."""
    directory = Path(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist: give the directory of a run, such as results/demo/lora")
    config = _json(path)
    run = RunConfig.from_resolved(config, str(path))
    shelf = directory.absolute().parent.parent / "store"
    keys = {"fetch_data": store.data_key(run), "tokenize": store.tokens_key(run)}
    if run.model.source:
        keys["fetch_model"] = store.model_key(run)
    if run.method.name != "none":
        keys["check_data"] = store.check_key(run)
    if run.model.tokenizer:
        keys["train_tokenizer"] = store.tokenizer_key(run)

    def shared(stage: str, folder: str) -> Record | None:
        return _json_or_none(shelf / folder / keys[stage] / "manifest.json") if stage in keys else None

    trained = run.method.name != "none"
    return Run(
        name=run.run,
        config=config,
        keys=keys,
        base_model=shared("fetch_model", "models"),
        data=shared("fetch_data", "data"),
        check=shared("check_data", "checks"),
        tokenizer=shared("train_tokenizer", "tokenizers"),
        tokens=shared("tokenize", "tokens"),
        train=_json_or_none(directory / "train" / "summary.json") if trained else None,
        metrics=_metrics(directory / "train" / "metrics.jsonl") if trained else None,
        export=_json_or_none(directory / "model" / "manifest.json"),
        evaluation=_json_or_none(directory / "eval" / "results.json"),
        parity=_json_or_none(directory / "serve" / "parity.json"),
    )


def _metrics(path: Path) -> pd.DataFrame | None:
    records = read_json_lines(path)
    if not records:
        return None
    frame = pd.DataFrame.from_records(records)
    if "step" not in frame or "loss" not in frame:
        raise DataError(f"{path} has no step and loss in its lines: remove it and run the stage train again")
    # a resumed run writes the steps after its checkpoint once more: the last line of a step counts
    return frame.drop_duplicates("step", keep="last").sort_values("step").reset_index(drop=True)


def _json(path: Path) -> Record:
    return json_object(path.read_text(encoding="utf-8"), path)


def _json_or_none(path: Path) -> Record | None:
    return _json(path) if path.is_file() else None
