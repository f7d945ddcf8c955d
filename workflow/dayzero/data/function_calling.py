"""Function calling in the layout of the Berkeley Function Calling Leaderboard (https://gorilla.cs.berkeley.edu).

A question row is `{id, question: [[{role, content}, ...]], function: [schema, ...]}`; an answer row with the same `id`
holds `ground_truth: [{function: {argument: [accepted values]}}]`. It becomes one user turn (instruction, schemas,
question) and one assistant turn with a single JSON object, `{"name": ..., "arguments": {...}}`.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pyarrow as pa

from dayzero.data.rows import Dropped, Example, needed_text
from dayzero.data.rows import column_value as column
from dayzero.errors import DataError

SCHEMA = pa.schema(
    [
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        *((name, pa.string()) for name in ("question", "functions", "accepted", "prompt", "completion", "category")),
    ]
)

PROMPT = """\
Call the one function that answers the question. Reply with a single JSON object and nothing else: \
{{"name": "<function>", "arguments": {{"<argument>": <value>}}}}

Functions:
{functions}

Question: {question}"""

MAY_BE_OMITTED = ""
"""Among an argument's accepted values: it may be left out."""


def read_answers(rows: Any) -> dict[str, list[Any]]:
    """`ground_truth` by `id`, from (origin, row) pairs; raises DataError for a repeated id or a missing column."""
    answers: dict[str, list[Any]] = {}
    for origin, row in rows:
        key, truth = column(row, "id", origin), column(row, "ground_truth", origin)
        if key in answers:
            raise DataError(f"{origin}: the id {key!r} has an answer already: ids must be unique over all answer files")
        if not isinstance(truth, list):
            raise DataError(f"{origin}: ground_truth must be a list of calls")
        answers[key] = truth
    return answers


def normalise_call(row: dict[str, Any], origin: str, answers: dict[str, list[Any]]) -> Example | Dropped:
    """One question with its answer. Dropped, by reason: rows without an answer, with several calls or turns, with an
    argument for which nothing is accepted, or which the function does not have. Raises DataError for another layout."""
    key, turns, functions = (column(row, name, origin) for name in ("id", "question", "function"))
    try:
        return _example(key, turns, functions, origin, answers)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"{origin}: not in the layout of the function-calling leaderboard ({type(error).__name__}: {error})"
        ) from error


def _example(key: str, turns: Any, functions: Any, origin: str, answers: dict[str, list[Any]]) -> Example | Dropped:
    if key not in answers:
        return Dropped("no_answer")
    if not isinstance(turns, list) or not isinstance(functions, list) or not all(isinstance(t, list) for t in turns):
        raise DataError(
            f"{origin}: question must be a list of turns (lists of messages) and function a list of schemas"
        )
    if len(turns) != 1 or [m["role"] for m in turns[0]].count("user") != 1 or turns[0][-1]["role"] != "user":
        return Dropped("several_turns")
    truth = answers[key]
    if len(truth) != 1 or len(truth[0]) != 1:
        return Dropped("several_calls")
    [(name, accepted)] = truth[0].items()
    schema = next((f for f in functions if f["name"] == name), None)
    if schema is None:
        return Dropped("unknown_function")
    parameters = schema.get("parameters", {})
    if not accepted.keys() <= parameters.get("properties", {}).keys():
        return Dropped("unknown_argument")
    if any(options == [] for options in accepted.values()):
        return Dropped("no_accepted_value")

    question = needed_text(turns[0][-1]["content"], origin, "the user's content")
    system = "\n".join(m["content"] for m in turns[0][:-1])
    schemas = "\n".join(json.dumps(f, ensure_ascii=False, separators=(",", ":")) for f in functions)
    prompt = PROMPT.format(functions=schemas, question=question)
    prompt = f"{system}\n\n{prompt}" if system else prompt
    arguments = canonical_arguments(accepted, set(parameters.get("required", [])))
    completion = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return Example(
        {
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}],
            "question": question,
            "functions": json.dumps(functions, ensure_ascii=False),
            "accepted": json.dumps(truth[0], ensure_ascii=False),
            "prompt": prompt,
            "completion": completion,
            "category": re.sub(r"_\d+(-\d+)*$", "", key),
        },
        question,
        len(prompt) + len(completion),
        key,
    )


def canonical_arguments(accepted: dict[str, Any], required: set[str]) -> dict[str, Any]:
    """The first accepted value of every argument; one that may be omitted is, where that is listed first.

    A required argument is always given: its first real value, or "" where there is no other.
    """
    arguments = {}
    for name, options in accepted.items():
        if not isinstance(options, list):  # a few nested objects hold a bare value instead of a list of them
            arguments[name] = _canonical(options)
            continue
        if not options:
            arguments[name] = []
        elif options[0] != MAY_BE_OMITTED:
            arguments[name] = _canonical(options[0])
        elif name in required:
            arguments[name] = _canonical(next((o for o in options if o != MAY_BE_OMITTED), options[0]))
    return arguments


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return canonical_arguments(value, set())
    return [_canonical(v) for v in value] if isinstance(value, list) else value
