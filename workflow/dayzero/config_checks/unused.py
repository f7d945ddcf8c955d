"""Settings that a run would ignore."""

from __future__ import annotations

from collections.abc import Iterator

from dayzero.config import Optimizer, RunConfig
from dayzero.config_checks.finding import Finding
from dayzero.config_checks.sources import rows_from

LOSS_KEYS = ("loss_turns", "loss_roles", "loss_parts", "loss_reasoning")
"""Keys of `tokenize` that say what of a conversation is supervised."""


def without_effect(run: RunConfig) -> list[Finding]:
    """Prefixes of keys that do nothing in this run, each with the reason."""
    checks = (_of_model, _of_data, _of_method, _of_training, _of_evaluation)
    return [Finding(*found) for check in checks for found in check(run)]


def _of_model(run: RunConfig) -> Iterator[tuple[str, str]]:
    if run.model.source is None:
        for key in ("sha256", "dtype", "allow_pickle"):
            yield f"model.{key}", "only the files of model.source have it, and this run has none"


def _of_data(run: RunConfig) -> Iterator[tuple[str, str]]:
    data = run.data
    for split in ("validation", "test"):
        if getattr(data, f"{split}_source") and getattr(data, f"{split}_size"):
            yield f"data.{split}_size", f"data.{split}_source gives the rows: leave one of the two out"
    if not any(source.startswith("hf:") for source in rows_from(run)):
        for key in ("subset", "split", "streaming"):
            yield f"data.{key}", "only hf: sources have it"
    if data.format not in ("auto", "messages", "sharegpt", "alpaca", "template", "function_calling"):
        for key in LOSS_KEYS:
            yield f"tokenize.{key}", f"only conversations have turns, data.format {data.format} makes none"


def _of_method(run: RunConfig) -> Iterator[tuple[str, str]]:
    method = run.method.name
    if not run.method.adapters:
        yield "method.lora", f"only method.name lora or qlora uses it, this run's is {method}"
    if method != "kd":
        yield "method.kd", f"only method.name kd uses it, this run's is {method}"
    if method == "none":
        for key in ("method.freeze", "train", "parallelism", "data_check", "resources.train", "resources.check_data"):
            yield key, "method.name none trains nothing, so this would be ignored"


def _of_training(run: RunConfig) -> Iterator[tuple[str, str]]:
    train, scheduler = run.train, run.train.lr_scheduler.name
    if run.method.name == "none":
        return
    if run.parallelism.cp == 1:
        yield "parallelism.cp_method", "only parallelism.cp above 1 uses it, this run's is 1"
    if train.loss not in ("auto", "chunked", "loss_parallel"):
        only = f"only train.loss auto, chunked or loss_parallel uses it, this run's is {train.loss}"
        yield "train.loss_chunk_size", only
    if scheduler != "wsd":
        yield (
            "train.lr_scheduler.decay_steps",
            f"only train.lr_scheduler.name wsd uses it, this run's is {scheduler}",
        )
    if scheduler == "constant":
        yield "train.lr_scheduler.min_lr_ratio", "train.lr_scheduler.name constant never lowers the learning rate"
    if train.validate_every and not (run.data.validation_source or run.data.validation_size):
        yield "train.validate_every", "there are no validation rows, since data.validation_size is 0: hold some out"
    yield from _of_optimizer(train.optimizer)


def _of_optimizer(optimizer: Optimizer) -> Iterator[tuple[str, str]]:
    users = {
        "muon": ("muon",),
        "adafactor": ("adafactor",),
        "betas": ("adamw", "muon", "adamw8bit"),
        "eps": ("adamw", "muon", "adamw8bit"),
        "implementation": ("adamw", "muon"),
        "state_dtype": ("adamw", "muon", "adafactor"),
    }
    for key, names in users.items():
        if optimizer.name not in names:
            only = f"only train.optimizer.name {' or '.join(names)} uses it, this run's is {optimizer.name}"
            yield f"train.optimizer.{key}", only


def _of_evaluation(run: RunConfig) -> Iterator[tuple[str, str]]:
    if not run.evaluate.tasks and not run.evaluate.extra_tasks:
        for key in ("limit", "batch_size", "dtype", "seed"):
            yield f"evaluate.{key}", "this run has no evaluate.tasks, so nothing is scored"
        yield "resources.evaluate", "this run has no evaluate.tasks, so nothing is scored"
