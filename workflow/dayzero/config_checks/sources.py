"""Where the model and the rows come from."""

from __future__ import annotations

from collections.abc import Iterator

from dayzero.config import RunConfig
from dayzero.context_length import context_field
from dayzero.errors import ConfigError
from dayzero.source import is_pattern, listed, parse_source


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
        context = context_field(model.architecture)
        if context and run.tokenize.seq_len > context[1]:
            yield (
                "tokenize.seq_len",
                f"longer than the context of the new model, model.architecture.{context[0]} {context[1]}: lower the "
                "one or raise the other",
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
            try:
                parse_source(source, key)
            except ConfigError as error:
                yield key, str(error).removeprefix(f"{key}: ")
            else:
                if not key.startswith("data.") and is_pattern(source):
                    yield key, f"{source!r} is a glob, and a model is one folder or file: give its path"


def rows_from(run: RunConfig) -> list[str]:
    """Every source of rows."""
    data = run.data
    return listed(data.source) + listed(data.validation_source) + listed(data.test_source)
