"""How rows are read, split and supervised."""

from __future__ import annotations

from collections.abc import Iterator

from dayzero.column_template import check_templates, parse_template
from dayzero.config import Data, RunConfig, Tokenize
from dayzero.errors import ConfigError
from dayzero.format_columns import COLUMNS, check_columns
from dayzero.source import listed


def check_data(run: RunConfig) -> Iterator[tuple[str, str]]:
    yield from check_rows(run.data)
    yield from _check_labels(run.tokenize)


def _check_labels(tokenize: Tokenize) -> Iterator[tuple[str, str]]:
    roles = tokenize.loss_roles
    if not roles:
        yield "tokenize.loss_roles", "names nobody, so that nothing would be supervised: name at least one role"
    if twice := [role for role in dict.fromkeys(roles) if roles.count(role) > 1]:
        yield "tokenize.loss_roles", f"names {', '.join(twice)} more than once: once is enough"
    if tokenize.loss_parts == "tool_arguments" and {*roles} != {"assistant"}:
        yield "tokenize.loss_parts", "tool_arguments are the assistant's: leave tokenize.loss_roles at [assistant]"
    if tokenize.min_label_tokens >= tokenize.seq_len:
        yield (
            "tokenize.min_label_tokens",
            f"{tokenize.min_label_tokens} >= tokenize.seq_len {tokenize.seq_len}, of which the first is never "
            "supervised, so that no document would be left: set it lower",
        )


def check_rows(data: Data) -> Iterator[tuple[str, str]]:
    """All that can be said of `data` before its rows are read; the stage that reads them checks with it too."""
    if not listed(data.source):
        yield "data.source", "name the rows to use (hf:, package: or local files)"
    yield from _check_format(data)
    yield from _check_columns(data)
    yield from _check_pins(data)
    yield from _check_counts(data)


def _check_format(data: Data) -> Iterator[tuple[str, str]]:
    if data.answers and data.format != "function_calling":
        yield "data.answers", f"only data.format function_calling has accepted answers, this run's is {data.format}"
    if data.format == "function_calling" and not data.answers:
        yield "data.answers", "data.format function_calling needs the files with the accepted answers"
    for text in listed(data.answers):
        if text.startswith("hf:"):
            yield "data.answers", f"{text}: answers are read from files: give a local path or a package"
    if data.template is not None and data.format not in ("auto", "template"):
        yield "data.template", f"goes with data.format template (or auto), this run's is {data.format}"
    if data.template is None and data.format == "template":
        yield "data.template", "data.format template needs it, e.g. {user: '{question}', assistant: '{answer}'}"
    if data.format == "pretokenized" and data.max_chars:
        yield "data.max_chars", "pretokenized rows have no characters: set it to null"


def _check_columns(data: Data) -> Iterator[tuple[str, str]]:
    if data.columns and data.format == "function_calling":
        yield "data.columns", "is not read by data.format function_calling: leave it out"
    try:
        if data.template is not None:
            check_templates(data.template)
        elif data.format == "auto" or data.format in COLUMNS:
            check_columns(data.format, data.columns)
    except ConfigError as error:
        key, _, message = str(error).partition(": ")
        yield key, message
        return
    if data.template is None:
        return
    parts = [part for key, text in data.template.items() for part in parse_template(text, key)]
    known = [name for _, name in parts if name is not None]
    for name in data.columns:
        if name not in ("id", *known):
            yield (
                "data.columns",
                f"{name!r} is not in data.template, which names {', '.join(dict.fromkeys(known))}: use one of them",
            )


def _check_pins(data: Data) -> Iterator[tuple[str, str]]:
    groups = (data.source, data.validation_source, data.test_source, data.answers)
    sources = [text for group in groups for text in listed(group)]
    if isinstance(data.sha256, str):
        if len(sources) > 1:
            yield "data.sha256", f"one sum for {len(sources)} sources: give a mapping of source to sum"
            return
        pinned = sources
    else:
        pinned = list(data.sha256 or {})
    for text in pinned:
        if text not in sources:
            yield "data.sha256", f"{text!r} is not one of the sources: use a source's exact text"
        elif text.startswith("hf:"):
            yield "data.sha256", f"{text} is a hub data set: pin its commit instead, `hf:org/name@commit`"


def _check_counts(data: Data) -> Iterator[tuple[str, str]]:
    sources = len(listed(data.source))
    if data.weights is not None:
        if len(data.weights) != sources:
            yield "data.weights", f"{len(data.weights)} weights for {sources} sources: give one for each"
        elif sources == 1:
            yield "data.weights", "there is one source, so nothing to weigh: set it to null"
        if data.format == "function_calling":
            yield "data.weights", "data.format function_calling has one kind of question: set it to null"
    if data.max_rows is not None and data.max_rows < sources:
        yield (
            "data.max_rows",
            f"{data.max_rows} rows for {sources} sources, which share them evenly: give at least one row for each, or "
            "name fewer sources",
        )
    shares = 0.0
    for key in ("validation_size", "test_size"):
        size = getattr(data, key)
        if isinstance(size, float):
            if not 0 <= size < 1:
                yield f"data.{key}", "a share must be at least 0 and below 1; for a number of rows write an integer"
            else:
                shares += size
    if shares >= 1:
        yield (
            "data.test_size",
            f"no rows left to train on: validation_size {data.validation_size} + test_size {data.test_size} >= 1",
        )
