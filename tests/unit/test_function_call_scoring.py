"""A call is right exactly when it is one of the accepted ones."""

import json

import pytest
from dayzero.evaluation.function_calls import parse_answer, process_nll, score_answer

ACCEPTED = {
    "book.table": {
        "place": ["Chez Nous, Paris", "Chez Nous"],
        "people": [2],
        "price": [30.0, 30.5],
        "outside": [True, ""],
        "days": [["2024-01-01", "2024-01-02"]],
        "wishes": [{"diet": ["vegan", "vegetarian"], "seats": [[1, 2]], "note": ["", "quiet"]}],
        "guests": [[{"name": ["Li"], "age": [18]}, {"name": ["Bo"], "age": [20, 21]}], ""],
    }
}
RIGHT = {
    "place": "Chez Nous, Paris",
    "people": 2,
    "price": 30.5,
    "outside": True,
    "days": ["2024-01-01", "2024-01-02"],
    "wishes": {"diet": "vegan", "seats": [1, 2], "note": "quiet"},
    "guests": [{"name": "Li", "age": 18}, {"name": "Bo", "age": 21}],
}
MISSING = object()


def score(arguments, name="book.table"):
    return score_answer(json.dumps({"name": name, "arguments": arguments}), ACCEPTED)["correct_call"]


def test_the_accepted_call_is_right():
    assert score_answer(json.dumps({"name": "book.table", "arguments": RIGHT}), ACCEPTED) == {
        "correct_call": 1.0,
        "right_function": 1.0,
        "valid_json": 1.0,
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("place", "chez nous paris"),  # case, spaces and punctuation do not count
        ("place", "CHEZ-NOUS"),
        ("price", 30),  # an integer where a float is accepted
        ("outside", MISSING),  # "" is among the accepted values
        ("guests", MISSING),
        ("wishes", {"diet": "Vegetarian", "seats": [1, 2]}),  # a nested key that may be left out
    ],
)
def test_variants_within_the_accepted_values_are_right(key, value):
    arguments = {k: v for k, v in {**RIGHT, key: value}.items() if v is not MISSING}
    assert score(arguments) == 1.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("place", "Chez Vous"),
        ("place", MISSING),
        ("place", None),
        ("people", 3),
        ("people", 2.0),  # a float where an integer is accepted
        ("people", "2"),
        ("people", True),
        ("outside", 1),  # an integer is no boolean, though Python says 1 == True
        ("outside", False),
        ("days", ["2024-01-02", "2024-01-01"]),
        ("days", ["2024-01-01"]),
        ("days", "2024-01-01"),
        ("wishes", {"diet": "vegan", "seats": [1, 3]}),
        ("wishes", {"diet": "vegan"}),  # a nested key is missing
        ("wishes", {"diet": "vegan", "seats": [1, 2], "more": 1}),  # nobody asked for it
        ("wishes", "vegan"),
        ("guests", [{"name": "Li", "age": 18}, {"name": "Bo", "age": 22}]),
        ("guests", [{"name": "Li", "age": 18}]),
        ("more", 1),
    ],
)
def test_one_value_off_makes_the_call_wrong(key, value):
    arguments = {k: v for k, v in {**RIGHT, key: value}.items() if v is not MISSING}
    assert score(arguments) == 0.0


def test_function_name_and_form_of_the_call_are_scored_apart():
    other = score_answer(json.dumps({"name": "other", "arguments": RIGHT}), ACCEPTED)
    assert other == {"correct_call": 0.0, "right_function": 0.0, "valid_json": 1.0}
    for call in ({"name": "book.table"}, {"name": "book.table", "arguments": RIGHT, "reason": "x"}):
        assert score_answer(json.dumps(call), ACCEPTED) == {
            "correct_call": 0.0,
            "right_function": 1.0,
            "valid_json": 1.0,
        }
    unhashable = score_answer('{"name": ["book.table"], "arguments": {}}', ACCEPTED)
    assert unhashable["right_function"] == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I cannot.",
        '```json\n{"name": "f", "arguments": {}}\n```',
        '{"name": "f", "arguments": {}} Done.',
        '{"name": "f", "arguments": {}}{"name": "f", "arguments": {}}',
        '[{"name": "f", "arguments": {}}]',
        '{"name": "f", "name": "g"}',
        '{"x": NaN}',
        '{"name": "f", "arguments": {"x": 1}',
        "[" * 100_000,
    ],
)
def test_anything_but_one_json_object_is_invalid(answer):
    assert parse_answer(answer) is None
    assert score_answer(answer, {"f": {}})["valid_json"] == 0.0


def test_white_space_around_the_object_is_allowed():
    assert parse_answer(' \n{"name": "f",\n "arguments": {}}\n') == {"name": "f", "arguments": {}}


def test_a_function_without_arguments_and_an_argument_without_accepted_values():
    assert score_answer('{"name": "f", "arguments": {}}', {"f": {}})["correct_call"] == 1.0
    assert score_answer('{"name": "f", "arguments": {"x": 1}}', {"f": {}})["correct_call"] == 0.0
    assert score_answer('{"name": "f", "arguments": {"x": []}}', {"f": {"x": []}})["correct_call"] == 1.0
    assert score_answer('{"name": "f", "arguments": {}}', {"f": {"x": []}})["correct_call"] == 0.0


def test_answer_nll_is_positive_and_per_utf8_byte():
    assert process_nll({"completion": "né"}, [(-6.0, False)]) == {"answer_nll": 6.0, "answer_nll_per_byte": 2.0}
