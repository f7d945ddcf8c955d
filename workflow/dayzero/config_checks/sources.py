"""Where the model and the rows come from."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dayzero.config import RunConfig

CONTEXT_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
"""What the configs of transformers call the longest sequence a model takes."""

_PACKAGE = re.compile(r"package:[A-Za-z0-9][A-Za-z0-9._-]*==[^/=\s]+/[^\s].*")
_HUB = re.compile(r"hf:[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_PREFIX = re.compile(r"([A-Za-z][A-Za-z0-9+]+):")


def check_model(run: RunConfig) -> Iterator[tuple[str, str]]:
    model, pretrain = run.model, run.method.name == "pretrain"
    if not pretrain:
        for key in ("architecture", "tokenizer"):
            if getattr(model, key) is not None:
                yield f"model.{key}", f"only with method.name pretrain, this run's is {run.method.name}: set it to null"
        if model.source is None:
            yield (
                "model.source",
                f"method.name {run.method.name} needs a model: use hf:, package: or a local path",
            )
        return
    if model.source is None and model.architecture is None:
        yield "model.architecture", "method.name pretrain needs model.architecture, or a model.source to copy it from"
    elif model.architecture is not None:
        if not isinstance(model.architecture.get("model_type"), str):
            yield "model.architecture", "needs the transformers name of the model, e.g. model_type: llama"
        if model.tokenizer is None and model.source is None:
            yield (
                "model.tokenizer",
                "pretraining needs a tokenizer: train one (model.tokenizer.vocab_size) or take that of a model.source",
            )
        context = next((n for n in CONTEXT_LENGTHS if isinstance(model.architecture.get(n), int)), None)
        if context and run.tokenize.seq_len > model.architecture[context]:
            yield (
                "tokenize.seq_len",
                f"longer than the context of the new model, model.architecture.{context} "
                f"{model.architecture[context]}: lower the one or raise the other",
            )
        if model.tokenizer is not None and model.source is not None:
            yield (
                "model.source",
                "would be ignored: model.architecture and model.tokenizer replace all of it; set model.source: null",
            )


def check_sources(run: RunConfig) -> Iterator[tuple[str, str]]:
    named = {"model.source": listed(run.model.source)}
    if run.method.name == "kd":
        named["method.kd.teacher"] = listed(run.method.kd.teacher)
    for key in ("source", "validation_source", "test_source", "answers"):
        named[f"data.{key}"] = listed(getattr(run.data, key))
    for key, sources in named.items():
        for source in sources:
            if problem := _bad_source(source):
                yield key, problem


def _bad_source(source: str) -> str | None:
    prefix = _PREFIX.match(source)
    if not source.strip():
        return "an empty source: use hf:org/name@revision, package:NAME==VERSION/path/inside or a local path"
    if prefix and prefix[1] == "hf":
        return None if _HUB.fullmatch(source) else f"{source}: write hf:org/name@revision"
    if prefix and prefix[1] == "package":
        return None if _PACKAGE.fullmatch(source) else f"{source}: write package:NAME==VERSION/path/inside"
    if prefix and len(prefix[1]) > 1:  # one letter: a Windows drive
        return f"{source}: unknown kind of source {prefix[1]}:, use hf:, package: or a local path"
    return None


def rows_from(run: RunConfig) -> list[str]:
    """Every source of rows."""
    data = run.data
    return listed(data.source) + listed(data.validation_source) + listed(data.test_source)


def listed(source: str | list[str] | None) -> list[str]:
    """One or several sources, or none, as a list."""
    return [source] if isinstance(source, str) else list(source or [])
