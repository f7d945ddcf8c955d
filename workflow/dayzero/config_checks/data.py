"""How rows are read, split and supervised."""

from __future__ import annotations

from collections.abc import Iterator

from dayzero.column_template import check_templates
from dayzero.config import RunConfig
from dayzero.config_checks.sources import listed
from dayzero.errors import ConfigError


def check_data(run: RunConfig) -> Iterator[tuple[str, str]]:
    data = run.data
    if not listed(data.source):
        yield "data.source", "name the rows to use (hf:, package: or local files)"
    if data.answers and data.format != "function_calling":
        yield "data.answers", f"only data.format function_calling has accepted answers, this run's is {data.format}"
    if data.format == "function_calling" and not data.answers:
        yield "data.answers", "data.format function_calling needs the files with the accepted answers"
    if data.template is not None:
        if data.format not in ("auto", "template"):
            yield "data.template", f"goes with data.format template (or auto), this run's is {data.format}"
        try:
            check_templates(data.template)
        except ConfigError as error:
            key, _, message = str(error).partition(": ")
            yield key, message
    elif data.format == "template":
        yield "data.template", "data.format template needs it, e.g. {user: '{question}', assistant: '{answer}'}"
    if data.weights is not None:
        if len(data.weights) != len(listed(data.source)):
            yield (
                "data.weights",
                f"{len(data.weights)} weights for {len(listed(data.source))} sources: give one for each",
            )
        elif len(data.weights) == 1:
            yield "data.weights", "there is one source, so nothing to weigh: set it to null"
        if data.format == "function_calling":
            yield "data.weights", "data.format function_calling has one kind of question: set it to null"
    if data.format == "pretokenized" and data.max_chars:
        yield "data.max_chars", "pretokenized rows have no characters: set it to null"
    if not run.tokenize.loss_roles:
        yield "tokenize.loss_roles", "names nobody, so that nothing would be supervised: name at least one role"
    if run.tokenize.loss_parts == "tool_arguments" and run.tokenize.loss_roles != ["assistant"]:
        yield "tokenize.loss_parts", "tool_arguments are the assistant's: leave tokenize.loss_roles at [assistant]"
    if isinstance(data.sha256, str) and len(listed(data.source)) > 1:
        yield "data.sha256", f"one sum for {len(listed(data.source))} sources: give a mapping of source to sum"
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
