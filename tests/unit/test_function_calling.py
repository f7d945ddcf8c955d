"""Function-calling rows: the prompt, the canonical answer, and which rows cannot be used."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dayzero.data.formats import Dropped, Example
from dayzero.data.function_calling import canonical_arguments, normalise_call, read_answers
from dayzero.errors import DataError
from dayzero.evaluation.function_calls import score_answer

SCHEMA = {
    "name": "area",
    "description": "Área",
    "parameters": {
        "type": "dict",
        "properties": {n: {"type": "integer"} for n in ("base", "height", "unit")},
        "required": ["base", "height"],
    },
}
ACCEPTED = {"base": [10], "height": [5, 5.0], "unit": ["", "cm"]}


def _row(**changes: Any) -> dict[str, Any]:
    question = [[{"role": "user", "content": "How {big} is it?"}]]
    return {"id": "live_simple_3-0-1", "question": question, "function": [SCHEMA], **changes}


def _call(row: dict[str, Any], truth: list[Any] | None = None) -> Example | Dropped:
    return normalise_call(row, "f:1", {"live_simple_3-0-1": [{"area": ACCEPTED}] if truth is None else truth})


def test_prompt_and_answer() -> None:
    example = _call(_row())
    assert isinstance(example, Example)
    columns = example.columns
    assert columns["messages"] == [
        {"role": "user", "content": columns["prompt"]},
        {"role": "assistant", "content": columns["completion"]},
    ]
    assert json.loads(columns["completion"]) == {"name": "area", "arguments": {"base": 10, "height": 5}}
    assert json.dumps(SCHEMA, ensure_ascii=False, separators=(",", ":")) in columns["prompt"]
    assert columns["prompt"].endswith("Question: How {big} is it?")
    assert json.loads(columns["accepted"]) == {"area": ACCEPTED}
    assert json.loads(columns["functions"]) == [SCHEMA]
    assert (columns["category"], example.id, example.question) == (
        "live_simple",
        "live_simple_3-0-1",
        "How {big} is it?",
    )


def test_a_system_message_goes_before_the_instruction() -> None:
    turns = [[{"role": "system", "content": "You order food."}, {"role": "user", "content": "Tea"}]]
    example = _call(_row(question=turns))
    assert isinstance(example, Example)
    assert example.columns["prompt"].startswith("You order food.\n\nCall the one function")
    assert example.question == "Tea"


@pytest.mark.parametrize(
    ("accepted", "required", "canonical"),
    [
        ({"a": ["", 3]}, set(), {}),
        ({"a": ["", 3]}, {"a"}, {"a": 3}),
        ({"a": [""]}, {"a"}, {"a": ""}),
        ({"a": [3, ""]}, set(), {"a": 3}),
        ({"a": [None, ""]}, set(), {"a": None}),
        ({"a": [[1, 2], [2, 1]]}, set(), {"a": [1, 2]}),
        ({"a": [{"b": ["x", "y"], "c": ["", 1], "d": [{"e": [1.5]}]}]}, set(), {"a": {"b": "x", "d": {"e": 1.5}}}),
        ({"a": [[{"b": ["x"]}, {"b": ["", "z"]}]]}, set(), {"a": [{"b": "x"}, {}]}),
        ({"a": [{"position": [{"x": 10.5, "y": 50}]}]}, set(), {"a": {"position": {"x": 10.5, "y": 50}}}),
    ],
)
def test_canonical_arguments(accepted: dict[str, Any], required: set[str], canonical: dict[str, Any]) -> None:
    assert canonical_arguments(accepted, required) == canonical
    answer = json.dumps({"name": "f", "arguments": canonical})
    assert score_answer(answer, {"f": accepted})["correct_call"] == 1


@pytest.mark.parametrize(
    ("changes", "truth", "reason"),
    [
        ({"id": "other"}, None, "no_answer"),
        ({"question": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]}, None, "several_turns"),
        ({}, [{"area": ACCEPTED}, {"area": ACCEPTED}], "several_calls"),
        ({}, [{"volume": ACCEPTED}], "unknown_function"),
        ({}, [{"area": {**ACCEPTED, "colour": ["red"]}}], "unknown_argument"),
        ({}, [{"area": {**ACCEPTED, "base": []}}], "no_accepted_value"),
    ],
)
def test_rows_that_cannot_be_used(changes: dict[str, Any], truth: list[Any] | None, reason: str) -> None:
    assert _call(_row(**changes), truth) == Dropped(reason)


def test_bad_rows() -> None:
    with pytest.raises(DataError, match=r"f:1: no column 'question'"):
        _call({"id": "a", "function": []})
    with pytest.raises(DataError, match="question must be a list of turns"):
        _call(_row(question="How big?"))
    with pytest.raises(DataError, match=r"f:1: not in the layout"):
        _call(_row(question=[[{"text": "How big?"}]]))
    with pytest.raises(DataError, match=r"f:1: the user's content holds nothing \(null\)"):
        _call(_row(question=[[{"role": "user", "content": None}]]))
    with pytest.raises(DataError, match=r"g:2: the id 'a' has an answer already"):
        read_answers([("g:1", {"id": "a", "ground_truth": []}), ("g:2", {"id": "a", "ground_truth": []})])
    with pytest.raises(DataError, match=r"g:1: no column 'ground_truth'"):
        read_answers([("g:1", {"id": "a"})])
