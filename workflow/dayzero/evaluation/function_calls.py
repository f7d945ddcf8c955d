"""Scores of a function call: is the model's answer one of the accepted calls?

The semantics are those of the Berkeley Function Calling Leaderboard's AST checker
(https://gorilla.cs.berkeley.edu/leaderboard.html), made recursive. `accepted` is `{function: {argument: [values]}}`:

- an argument is right when it equals one of its accepted values; "" among them means that it may be left out;
- strings are equal without regard to case, spaces and the punctuation `,./-_*^`; quotes may be single or double;
- an integer is right where a float is accepted, not the other way round; true and false are no numbers;
- lists are compared element by element; objects key by key, where a key holds its own list of accepted values;
- an empty list of accepted values accepts the empty list (there, the leaderboard accepts nothing at all);
- an argument or key that is missing (and may not be left out) or that nobody asked for makes the call wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

MAY_BE_OMITTED = ""


def parse_answer(answer: str) -> dict[str, Any] | None:
    """The JSON object that `answer` consists of, or None.

    Strict: only white space may surround the object. Code fences, prose, a second object, a repeated key and
    NaN/Infinity (not JSON) give None, because a program that reads the answer would fail on them as well.
    """
    try:
        value = json.loads(answer, object_pairs_hook=_unique_keys, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def score_answer(answer: str, accepted: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, float]:
    """Score one answer (text) against the accepted calls; each value is 0.0 or 1.0.

    valid_json: the answer is one JSON object. right_function: its `name` is an accepted function.
    correct_call: moreover it holds exactly `name` and `arguments`, and every argument is within the accepted values.
    """
    answered = parse_answer(answer)
    call = answered or {}
    name = call.get("name")
    arguments = accepted.get(name) if isinstance(name, str) else None
    right = arguments is not None
    correct = arguments is not None and call.keys() == {"name", "arguments"} and _object(call["arguments"], arguments)
    return {"correct_call": float(correct), "right_function": float(right), "valid_json": float(answered is not None)}


def process_call(doc: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """lm-eval's `process_results` for a generated answer: `doc["accepted"]` is the JSON text of the accepted calls."""
    return score_answer(results[0], json.loads(doc["accepted"]))


def process_nll(doc: Mapping[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """lm-eval's `process_results` for the likelihood of the canonical answer.

    answer_nll: negative log likelihood of the whole answer in nats; answer_nll_per_byte: the same divided by the
    answer's UTF-8 bytes, which makes models with different tokenizers comparable. Lower is better.
    """
    nll = -float(results[0][0])
    return {"answer_nll": nll, "answer_nll_per_byte": nll / len(doc["completion"].encode())}


def _accepted(value: Any, options: Any) -> bool:
    """Whether `value` equals one of `options` (a single value counts as a list of one)."""
    if options == []:
        return value == []
    return any(_equal(value, option) for option in (options if isinstance(options, list) else [options]))


def _equal(value: Any, option: Any) -> bool:
    if isinstance(option, str):
        return isinstance(value, str) and _standardise(value) == _standardise(option)
    if isinstance(option, dict):
        return _object(value, option)
    if isinstance(option, list):
        return (
            isinstance(value, list)
            and len(value) == len(option)
            and all(_equal(v, o) for v, o in zip(value, option, strict=True))
        )
    if isinstance(option, float) and type(value) is int:  # type(), as bool is a subclass of int
        return value == option
    return type(value) is type(option) and value == option


def _object(value: Any, accepted: Mapping[str, Any]) -> bool:
    if not isinstance(value, dict) or not value.keys() <= accepted.keys():
        return False
    return all(
        _accepted(value[key], options) if key in value else _may_be_omitted(options)
        for key, options in accepted.items()
    )


def _may_be_omitted(options: Any) -> bool:
    return isinstance(options, list) and MAY_BE_OMITTED in options


def _standardise(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a repeated key")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(constant)
