"""Every format of docs/data.md: its example is told by itself, and becomes what the page says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dayzero.column_template import check_templates, parse_template
from dayzero.config import Tokenize
from dayzero.data.documents import DocumentEncoder
from dayzero.data.formats import FORMATS, normalise
from dayzero.data.rows import Dropped, Example, PaddedRow
from dayzero.data.tokens import IGNORE, TokenRows
from dayzero.errors import ConfigError, DataError
from dayzero.stages import fetch_data, tokenize
from transformers import AutoTokenizer

from tests.tiny_tokenizer import tiny_tokenizer
from tests.unit.chat_templates import JSON_CALLS

EXAMPLES = Path(__file__).resolve().parents[2] / "docs/examples/data"
TEMPLATE = {"user": "About {topic}: {ask}", "assistant": "{reply}"}
STORED = {
    "text.txt": ("text", 3),
    "prompt_completion.jsonl": ("prompt_completion", 3),
    "alpaca.jsonl": ("messages", 3),
    "messages.jsonl": ("messages", 3),
    "sharegpt.jsonl": ("messages", 3),
    "squad.jsonl": ("prompt_completion", 2),
    "multiple_choice.jsonl": ("prompt_completion", 3),
    "template.jsonl": ("messages", 3),
    "pretokenized.jsonl": ("pretokenized", 3),
    "megatron.idx": ("pretokenized", 3),
    "megatron.bin": ("pretokenized", 3),
}
"""Of each example: the kind of row it becomes, and rows with an answer."""


def fetch(output: Path, **data: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The manifest and the training rows."""
    config = json.dumps({"data": {"validation_size": 0, **data}})
    assert fetch_data.main(["--config", config, "--output", str(output)]) == 0
    return json.loads((output / "manifest.json").read_text()), pq.read_table(output / "train.parquet").to_pylist()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=JSON_CALLS))


@pytest.mark.parametrize("name", STORED)
def test_examples(name: str, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stored, count = STORED[name]
    template = {"template": TEMPLATE} if name.startswith("template") else {}
    manifest, rows = fetch(tmp_path / "out", source=str(EXAMPLES / name), **template)
    stem = {"megatron": "pretokenized"}.get(Path(name).stem, Path(name).stem)
    assert (manifest["format"], manifest["source_format"], len(rows)) == (stored, stem, count)
    if not template:
        assert f"format: {stem} (from the columns " in capsys.readouterr().err
    explicit, again = fetch(tmp_path / "explicit", source=str(EXAMPLES / name), format=stem, **template)
    assert (explicit["splits"], again) == (manifest["splits"], rows)
    encoder = DocumentEncoder(tokenizer, stored, Tokenize())
    made = [document for row in rows for document in encoder.encode(row)]
    assert len(made) == count
    assert all(any(mask) and len(ids) == len(mask) for ids, mask in made)


@pytest.mark.parametrize("name", ["messages", "sharegpt"])
def test_the_example_template_writes_what_the_example_conversations_hold(name: str, tmp_path: Path) -> None:
    """The demo's model, whose tokenizer this one is like, has a template without tools."""
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    fetch(tmp_path / "data", source=str(EXAMPLES / f"{name}.jsonl"))
    folders = ["--data", str(tmp_path / "data"), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "tokens")]
    config: dict[str, Any] = {"tokenize": {"packing": False, "seq_len": 1024}}
    assert tokenize.main(["--config", json.dumps(config), *folders]) == 1, "so that the page names the other"
    config["model"] = {"chat_template": str(EXAMPLES.parent / "chat_template.jinja")}
    for number, options in enumerate(({}, {"loss_reasoning": False}, {"loss_parts": "tool_arguments"})):
        config["tokenize"] |= options
        folders[-1] = str(tmp_path / f"tokens{number}")
        assert tokenize.main(["--config", json.dumps(config), *folders]) == 0
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    rows = TokenRows(tmp_path / "tokens0/train")
    found = [(loaded.decode(r.input_ids), loaded.decode(r.labels[r.labels != IGNORE])) for r in map(rows.row, range(3))]
    whole, answers = next(both for both in found if "tool_call" in both[1])
    assert '{"type": "function", "function": {"name": "get_weather", "description": "The weather of a city"' in whole
    city = {"messages": "Oslo", "sharegpt": "Lisbon"}[name]
    assert f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{city}"' in answers
    assert {"messages": '<|im_start|>tool\n{"rain": true}<|im_end|>', "sharegpt": '{"celsius": 27}'}[name] in whole
    assert ("<think>\nI should look it up.\n</think>\n\n<tool_call>" in answers) == (name == "messages")
    assert answers.endswith({"messages": "umbrella.<|im_end|>", "sharegpt": "27 degrees.<|im_end|>"}[name])
    masked = TokenRows(tmp_path / "tokens1/train")
    said = [loaded.decode(r.labels[r.labels != IGNORE]) for r in map(masked.row, range(3))]
    assert not any("<think>" in text for text in said)


def test_every_format_has_an_example() -> None:
    names = {Path(name).stem for name in STORED}
    assert set(FORMATS) | {"template", "megatron"} == names
    assert {p.name for p in EXAMPLES.iterdir()} == set(STORED)


def messages_of(row: dict[str, Any], format_name: str) -> list[dict[str, Any]]:
    example = normalise(row, "f:1", format_name, {})
    assert isinstance(example, Example)
    return example.columns["messages"]


def test_messages_keep_tools_calls_and_reasoning() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "messages.jsonl").read_text().splitlines()]
    example = normalise(rows[1], "f:1", "messages", {})
    assert isinstance(example, Example)
    _, call, result, _ = example.columns["messages"]
    assert json.loads(call["tool_calls"]) == [
        {
            "type": "function",
            "id": "call_1",
            "function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": 1}},
        }
    ]
    assert (call["content"], call["reasoning_content"]) == ("", "I should look it up.")
    assert (result["name"], result["tool_call_id"]) == ("get_weather", "call_1")
    assert json.loads(example.columns["tools"]) == rows[1]["tools"]
    assert messages_of(rows[2], "messages")[0]["content"] == "Say hello."


def test_sharegpt_becomes_messages() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "sharegpt.jsonl").read_text().splitlines()]
    assert messages_of(rows[1], "sharegpt") == [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "How many legs has a spider?"},
        {"role": "assistant", "content": "Eight."},
    ]
    called = messages_of(rows[2], "sharegpt")
    assert [m["role"] for m in called] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(called[1]["tool_calls"])[0]["function"] == {
        "name": "get_weather",
        "arguments": {"city": "Lisbon"},
    }


def test_json_text_and_nulls_of_arrow_are_read() -> None:
    """Parquet gives every call the keys of all calls, and CSV has only texts."""
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    for row, arguments in (
        ({"messages": json.dumps([{"role": "assistant", "tool_calls": [call]}])}, {"a": 1, "b": None}),
        (PaddedRow(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}]), {"a": 1}),
    ):
        [message] = messages_of(row, "messages")
        assert json.loads(message["tool_calls"])[0]["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"ctx": "He", "endings": ["ran.", " sat. "], "label": "1"}, "He", " sat."),
        ({"question": "Q?", "choices": ["x", "y"], "answer": 0}, "Q?\nA. x\nB. y\nAnswer:", " A. x"),
        ({"question": "Q?", "choices": ["x", "y"], "answer": "B"}, "Q?\nA. x\nB. y\nAnswer:", " B. y"),
        ({"question": "Q?", "choices": ["x", "y"], "gold": "y"}, "Q?\nA. x\nB. y\nAnswer:", " B. y"),
        (
            {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
            "Q?\n1. x\n2. y\nAnswer:",
            " 1. x",
        ),
        # where labels are numbers, a number is one of them and not a place
        (
            {"question": "Q?", "choices": {"text": ["x", "y", "z"], "label": [1, 2, 3]}, "answer": 1},
            "Q?\n1. x\n2. y\n3. z\nAnswer:",
            " 1. x",
        ),
        ({"ctx": "He", "endings": {"text": ["ran.", "sat."], "label": ["1", "2"]}, "label": 2}, "He", " sat."),
        (
            {"question": "1 + 1?", "choices": [1, 2.5, True, 2], "answer": 3},
            "1 + 1?\nA. 1\nB. 2.5\nC. true\nD. 2\nAnswer:",
            " D. 2",
        ),
        ({"question": "1 + 1?", "choices": [7, 2], "answer": 7}, "1 + 1?\nA. 7\nB. 2\nAnswer:", " A. 7"),
    ],
)
def test_multiple_choice(row: dict[str, Any], prompt: str, completion: str) -> None:
    example = normalise(row, "f:1", "multiple_choice", {})
    assert isinstance(example, Example)
    assert example.columns == {"prompt": prompt, "completion": completion}


def test_rows_without_an_answer_are_dropped() -> None:
    choice = {"ctx": "He", "endings": ["ran.", "sat."]}
    question = {"context": "c", "question": "q"}
    for name, row, reason in (
        ("multiple_choice", {**choice, "label": ""}, "no_answer"),
        ("multiple_choice", {**choice, "label": -1}, "no_answer"),
        ("squad", {**question, "answers": {"text": []}}, "no_answer"),
        ("squad", {**question, "answers": [" "]}, "empty"),
        ("alpaca", {"instruction": "Do", "output": ""}, "empty"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}]}, "no_assistant_turn"),
        ("messages", {"messages": [{"role": "system", "content": "Only a system."}]}, "no_assistant_turn"),
        ("pretokenized", {"input_ids": []}, "empty"),
    ):
        assert normalise(row, "f:1", name, {}) == Dropped(reason)


def test_nulls_that_say_something_are_kept() -> None:
    """No answer, a column that need not be there, and no words beside a call or reasoning."""
    for name, row in (
        ("text", {"text": None}),
        ("prompt_completion", {"prompt": "p", "completion": None}),
        ("alpaca", {"instruction": "Do", "output": None}),
        ("squad", {"context": "c", "question": "q", "answers": [None]}),
    ):
        assert normalise(row, "f:1", name, {}) == Dropped("empty")
    row = {"instruction": "Do", "input": None, "output": "Done", "system": None, "history": None}
    assert [m["content"] for m in messages_of(row, "alpaca")] == ["Do", "Done"]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    thought = {"role": "assistant", "content": None, "reasoning_content": "Hm."}
    assert [m["content"] for m in messages_of({"messages": [call, thought]}, "messages")] == ["", ""]


def test_a_null_question_is_a_bad_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty prompt would teach to answer nothing."""
    table = [("p", "c"), (None, "an answer to nothing"), ("q", None), ("", "to an empty prompt")]
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in table))
    config = {"source": str(file), "validation_size": 0}
    template = {"user": "{prompt}", "assistant": "{completion}"}
    two = {**template, "user": "{prompt}{more}{prompt}"}
    file.write_text(file.read_text().replace('{"prompt": null,', '{"prompt": null, "more": null,'))
    file.write_text(file.read_text().replace('{"prompt": "', '{"more": "", "prompt": "'))
    for extra, said in (
        ({}, "column 'prompt'"),
        ({"template": template}, "data.template.user: 'prompt'"),
        ({"template": two, "split_seed": 1}, "data.template.user: each of 'prompt', 'more'"),
    ):
        data = json.dumps({"data": {**config, **extra}})
        assert fetch_data.main(["--config", data, "--output", str(tmp_path / "no")]) == 1
        assert f"{file}:2: {said} holds nothing (null)" in capsys.readouterr().err.splitlines()[-1]
        manifest, rows = fetch(tmp_path / f"out{len(extra)}", **config, **extra, on_bad_row="reject")
        assert (manifest["rejected"]["rows"], manifest["dropped"], len(rows)) == (1, {"empty": 1}, 2)


def _called(arguments: str) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]}


def labelled(labels: Any, answer: Any) -> dict[str, Any]:
    return {"question": "q", "choices": {"text": ["a", "b"], "label": labels}, "answer": answer}


def test_what_stands_beside_the_messages_is_part_of_the_conversation() -> None:
    asked, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    system = {"role": "system", "content": "Be kind."}
    for messages in ([asked, said], [system, asked, said]):
        assert messages_of({"messages": messages, "system": "Be kind."}, "messages") == [system, asked, said]
    turns = [{"from": "system", "value": "Be kind."}, {"from": "gpt", "value": "Hello", "weight": 1}]
    assert messages_of({"conversations": turns, "system": "Be kind."}, "sharegpt") == [system, said]
    row = {"messages": [asked, said], "functions": [{"name": "f"}]}
    example = normalise(row, "f:1", "messages", {"tools": "functions"})
    assert isinstance(example, Example)
    assert json.loads(example.columns["tools"]) == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("history", [[["Hi", "Hello"], ["And?", "So."]], '[["Hi", "Hello"], ["And?", "So."]]'])
def test_the_history_of_an_instruction_is_the_turns_before_it(history: Any) -> None:
    row = {"instruction": "Go", "output": "Gone", "system": "Be kind.", "history": history, "tools": None}
    found = messages_of(row, "alpaca")
    assert [m["content"] for m in found] == ["Be kind.", "Hi", "Hello", "And?", "So.", "Go", "Gone"]
    assert [m["role"] for m in found] == ["system", *["user", "assistant"] * 3]
    assert len(messages_of({**row, "history": []}, "alpaca")) == 3


def test_an_answer_that_begins_with_a_bracket() -> None:
    for answers, answer in (("[1] is it", "[1] is it"), ('["one"]', "one"), ('{"text": ["two"]}', "two")):
        example = normalise({"context": "c", "question": "q", "answers": answers}, "f:1", "squad", {})
        assert isinstance(example, Example)
        assert example.columns["completion"] == f" {answer}"


def test_token_ids_of_a_csv_file(tmp_path: Path) -> None:
    text = 'input_ids,labels,attention_mask\n"[5, 6, 7]","[-100, 6, 7]","[1, 1, 0]"\n'
    (tmp_path / "ids.csv").write_text(text)
    _, [row] = fetch(tmp_path / "out", source=str(tmp_path / "ids.csv"))
    assert (row["input_ids"], row["loss_mask"]) == ([5, 6], [False, True])


def test_a_missing_number_of_a_table_is_a_null(tmp_path: Path) -> None:
    pq.write_table(pa.table({"title": ["a", "b"], "year": [1999.0, float("nan")]}), tmp_path / "a.parquet")
    _, rows = fetch(tmp_path / "out", source=str(tmp_path / "a.parquet"), template={"text": "{title}|{year}"})
    assert [row["text"] for row in rows] == ["a|1999.0", "b|"]


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("messages", {"messages": [{"role": "developer", "content": "x"}]}, "has the role 'developer'"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of the type image"),
    ("messages", {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "only a message of the role"),
    ("messages", _called("{"), "no JSON in the arguments of call 1, though the text begins so"),
    ("messages", _called("x"), "arguments are text, expected an object"),
    ("messages", {"messages": [], "tools": "{}"}, "holds an object, expected a list of tools"),
    ("messages", {"messages": [], "tools": [{"type": "function"}]}, "tool 1 has type"),
    ("messages", {"messages": [{"role": "user", "content": "\ud83d"}]}, "half of a surrogate pair"),
    ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "turn 1 of 'conversations' is from 'alien'"),
    ("sharegpt", {"conversations": [{"value": "x"}]}, "has value, expected from and value"),
    ("alpaca", {"instruction": ["x"], "output": "y"}, "column 'instruction' holds a list, expected text"),
    ("squad", {"context": "c", "question": "q", "answers": 3}, "column 'answers' holds a number"),
    ("multiple_choice", {"ctx": "c", "endings": ["a", "b"], "label": 2}, "a choice's number from 0 to 1"),
    ("multiple_choice", {"ctx": "c", "endings": ["a"], "label": 0}, "a list of at least two texts"),
    ("multiple_choice", labelled([1, 2], 0), "holds 0, expected one of the labels 1, 2 or its text"),
    ("multiple_choice", labelled(["1", "2"], "0"), "holds '0', expected one of the labels 1, 2 or its text"),
    ("multiple_choice", labelled([1.0, 2.0], 1), "has the label 1.0, expected texts or integers"),
    ("multiple_choice", {**labelled(None, 2), "choices": [1, 2, 4]}, "holds 2, the text of one choice and the number"),
    ("messages", {"messages": [], "functions": [{"name": "f"}]}, "column 'functions' stands beside the conversation"),
    ("messages", {"messages": [{"role": "system", "content": "a"}], "system": "b"}, "'system' and the system message"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": "x", "weight": 0}]}, "turn 1 of 'conversations' has w"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": "x", "train": False}]}, "has train False, which is not"),
    ("messages", {"messages": [{"role": "assistant", "content": "x", "training": False}]}, "has training False"),
    ("alpaca", {"instruction": "x", "output": "y", "history": ["z"]}, "'history' is no list of [question, answer]"),
    ("squad", {"context": "c", "question": "q", "answers": "['x']"}, "no JSON in column 'answers', though the text "),
    ("messages", {"messages": [{"role": "user", "content": None}]}, "message 1 of 'messages': content holds nothing"),
    ("messages", {"messages": [{"role": "assistant", "content": None}]}, "content holds nothing (null), expected tex"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "content holds noth"),
    ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "value holds nothing (null)"),
    ("alpaca", {"instruction": None, "output": "y"}, "column 'instruction' holds nothing (null)"),
    ("alpaca", {"instruction": "x", "output": "y", "history": [[None, "z"]]}, "'history': it holds nothing (null)"),
    ("squad", {"context": None, "question": "q", "answers": ["a"]}, "column 'context' holds nothing (null)"),
    ("multiple_choice", {"ctx": None, "endings": ["a", "b"], "label": 1}, "column 'ctx' holds nothing (null)"),
    ("multiple_choice", {"ctx": "c", "endings": ["a", None], "label": 0}, "'endings' holds a choice that is null"),
    ("pretokenized", {"input_ids": "1 2"}, "holds text, expected a list of integers"),
    ("pretokenized", {"input_ids": [1, 2.5]}, "holds 2.5, expected integers from 0"),
    ("pretokenized", {"input_ids": [1, -2]}, "holds -2"),
    ("pretokenized", {"input_ids": [1, 2], "labels": [1]}, "has 1 entries for 2 tokens"),
    ("pretokenized", {"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "labels are not shifted here"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "said"), BAD)
def test_rows_that_break_their_format(name: str, row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=r"^f:7: ") as caught:
        normalise(row, "f:7", name, {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_templates_name_columns_and_nothing_else(tmp_path: Path) -> None:
    assert parse_template("{a} {{x}} {b c}", "k") == [("", "a"), (" {", None), ("x}", None), (" ", "b c")]
    for evil in ("{a.__class__}", "{a[0]}", "{a!r}", "{a:>10}", "{}", "{a:{b}}", "{a", "a}", "{ }"):
        with pytest.raises(ConfigError, match=r"^data\.template\.text: .*(plain column name|no template)"):
            check_templates({"text": evil})
    for keys in ({}, {"prompt": "{a}"}, {"text": "{a}", "user": "{a}"}, {"system": "{a}", "text": "{a}"}):
        with pytest.raises(ConfigError, match=r"data\.template: has"):
            check_templates(keys)
    with pytest.raises(ConfigError, match="names no column"):
        check_templates({"text": "always the same"})
    row = {"a": "{b} {0.__class__}", "n": 3, "yes": True, "none": None, "list": []}
    got = normalise(row, "f:1", "template", {}, {"text": "{a}|{n}|{yes}|{none}"})
    assert isinstance(got, Example)
    assert got.columns == {"text": "{b} {0.__class__}|3|true|"}, "a row's braces are text"
    for template, said in (({"text": "{list}"}, "column 'list' holds a list"), ({"text": "{aa}"}, "did you mean 'a'")):
        with pytest.raises(DataError, match=said):
            normalise(row, "f:1", "template", {}, template)


def test_template_columns_can_be_renamed_and_unused_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"q.text": "why?", "reply": "so"}\n')
    data = {"source": str(tmp_path / "r.jsonl"), "template": {"prompt": "{q}", "completion": "{reply}"}}
    _, rows = fetch(tmp_path / "out", **data, columns={"q": "q.text"})
    assert [(r["prompt"], r["completion"]) for r in rows] == [("why?", "so")]
    config = json.dumps({"data": {**data, "columns": {"x": "q.text"}}})
    assert fetch_data.main(["--config", config, "--output", str(tmp_path / "no")]) == 1


def test_sources_of_several_formats_become_one_kind(tmp_path: Path) -> None:
    names = ["alpaca.jsonl", "sharegpt.jsonl", "messages.jsonl"]
    manifest, rows = fetch(tmp_path / "out", source=[str(EXAMPLES / name) for name in names])
    assert manifest["source_format"] == "alpaca, sharegpt, messages"
    assert [s["format"] for s in manifest["sources"]] == ["alpaca", "sharegpt", "messages"]
    assert manifest["splits"]["train"]["source_rows"] == [3, 3, 3]
    assert len(rows) == 9


def test_mixed_kinds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [str(EXAMPLES / "text.txt"), str(EXAMPLES / "alpaca.jsonl")]
    config = json.dumps({"data": {"source": sources}})
    assert fetch_data.main(["--config", config, "--output", str(tmp_path / "out")]) == 1
    assert "is of format alpaca, kept as messages, but rows before it are kept as text" in capsys.readouterr().err
