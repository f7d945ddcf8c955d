"""Reading every kind of file, and what a row of each format becomes."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from dayzero.data import json_rows
from dayzero.data.file_kinds import data_files
from dayzero.data.formats import Dropped, Example, detect_format, normalise
from dayzero.data.json_rows import json_array_or_lines
from dayzero.data.readers import read_rows
from dayzero.errors import ConfigError, DataError
from dayzero.format_columns import check_columns
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS = [{"prompt": "why é 2+2?", "completion": "4"}, {"prompt": 'say "a,b"\nagain', "completion": "ab"}]


def _jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def _write(path: Path) -> Path:
    kind = path.name.split(".", 1)[1]
    csv = 'prompt,completion\nwhy é 2+2?,4\n"say ""a,b""\nagain",ab\n'
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "array.json":
        path.write_text("\n" + json.dumps(ROWS, indent=1), encoding="utf-8")
    elif kind == "tsv":
        path.write_text(csv.replace(",", "\t").replace("a\tb", "a,b"), encoding="utf-8")
    elif kind in ("csv", "csv.gz"):
        path.write_bytes(gzip.compress(csv.encode()) if kind.endswith("gz") else b"\xef\xbb\xbf" + csv.encode())
    else:
        data = _jsonl(ROWS).encode()
        packed = {"gz": gzip.compress, "zst": zstandard.compress}.get(kind.rpartition(".")[2], bytes)
        path.write_bytes(packed(data))
    return path


KINDS = ["jsonl", "json", "array.json", "ndjson", "csv", "csv.gz", "tsv", "parquet", "jsonl.gz", "jsonl.zst"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    got = list(read_rows(_write(tmp_path / f"rows.{kind}"), "rows"))
    assert [row for _, row in got] == ROWS
    first = {"csv": 2, "csv.gz": 2, "tsv": 2, "array.json": 3}.get(kind, 1)
    assert got[0][0] == f"rows:{first}"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def json_error(text: str) -> str | None:
    """What is wrong with a text that is to be JSON."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f"f:{error.lineno}: not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
    return None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=4),
    style=st.sampled_from([{}, {"indent": 1}, {"ensure_ascii": False}, {"separators": (" \n ,", ": ")}]),
    chunk=st.integers(1, 9),
    cut=st.integers(1, 20),
)
def test_a_json_array_is_read_in_pieces(rows: list[Any], style: dict[str, Any], chunk: int, cut: int) -> None:
    """Wherever the pieces end, the rows are those of the whole, and a fault is named where the whole has it."""

    def read(text: str) -> list[Any]:
        return [row for _, row in json_array_or_lines(io.StringIO(text, newline=""), "f")]

    text = "\n " + json.dumps(rows, **style) + "\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK", chunk)
        assert read(text) == rows
        for broken in (text[:-cut], text + "]", text.replace(":", "")):
            if (said := json_error(broken)) and "[" in broken:
                with pytest.raises(DataError) as caught:
                    read(broken)
                assert str(caught.value) == said


@pytest.mark.parametrize("separator", [",", ",\n"])
def test_a_json_array_is_not_held_in_memory(tmp_path: Path, separator: str) -> None:
    line = json.dumps({"text": "word " * 200})
    (tmp_path / "a.json").write_text("[" + separator.join([line] * 10_000) + "]")
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_rows(tmp_path / "a.json", "a.json"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 10_000
    assert peak < 6 * 2**20


def test_a_row_of_a_json_array_is_named_by_the_line_that_it_begins_in(tmp_path: Path) -> None:
    rows = [{"instruction": "a\\nb", "output": 1}, {"output": 2, "words": ["x"] * 9}, {"output": 3}]
    pretty, one_line = json.dumps(rows, indent=2), json.dumps(rows)
    for text, lines in (
        (pretty, ["2", "6", "20"]),
        (pretty.replace("\n", "\r\n"), ["2", "6", "20"]),
        (one_line, ["1", "1#2", "1#3"]),
        ("\n" + one_line.replace(', {"output": 3', ',\n{"output": 3'), ["2", "2#2", "3"]),
    ):
        (tmp_path / "a.json").write_bytes(text.encode())
        for chunk in (1, 7, json_rows.CHUNK):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(json_rows, "CHUNK", chunk)
                assert list(read_rows(tmp_path / "a.json", "a")) == [
                    (f"a:{line}", row) for line, row in zip(lines, rows, strict=True)
                ]


def test_a_fault_in_a_json_array_is_told_where_it_stands(tmp_path: Path) -> None:
    """And not after the rest of the file has been read, in search of its end."""
    (tmp_path / "a.json").write_text('[{"text": "a"},\n {"text": b},' + '{"text": "c"},' * 1_000_000 + "5]")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"^a:2: not valid JSON \(Expecting value at column 11\)"):
            list(read_rows(tmp_path / "a.json", "a"))
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20
    finally:
        tracemalloc.stop()


def test_text_is_a_document_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\r\n\n  two \n")
    assert list(read_rows(file, "a.txt")) == [("a.txt:1", {"text": "one"}), ("a.txt:3", {"text": "  two "})]


def test_a_directory_gives_its_data_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "deep/a.csv.gz", "README", ".hidden.jsonl", "a.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [label for _, label in data_files(tmp_path, "d")] == ["d/a.parquet", "d/b.jsonl", "d/deep/a.csv.gz"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file in the directory"):
        data_files(tmp_path / "empty", "d")


def _cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


BIG = _jsonl([{"text": f"{i * 7919 % 1000003}"} for i in range(5000)]).encode()
BAD = {
    "empty.jsonl": (b"", "the file is empty"),
    "cut.jsonl.gz": (_cut(gzip.compress(BIG)), "damaged or cut off"),
    "cut.jsonl.zst": (_cut(zstandard.compress(BIG)), "damaged or cut off"),
    "not.jsonl.gz": (b"plain text", "damaged or cut off"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', r"bad\.jsonl:2: not valid JSON"),
    "open.jsonl": (b'{"text": "a\n', r"open\.jsonl:1: not valid JSON \(Invalid control character at column 12\)"),
    "open.json": (b'[{"text": "a', r"open\.json:1: not valid JSON \(Unterminated string starting at column 11\)"),
    "bad.json": (b'\n[{"text": "a"},\n {"text": }]', r"bad\.json:3: not valid JSON"),
    "list.jsonl": (b"[1]\n", r"list\.jsonl:1: a row must be a JSON object, found list"),
    "one.json": (b'{\n"text": "a"}', "one JSON object: write a list"),
    "bad.parquet": (b"PAR1 no", "cannot be read as parquet"),
    "cut.csv": (b"a,b\n1,2\n1\n", r"cut\.csv:3: fewer fields than the header's 2"),
    "more.csv": (b"a,b\n1,2,3\n", r"more\.csv:2: more fields"),
    "twice.csv": (b"text,text,,\n1,2,,\n", r"twice\.csv:1: several columns are called text: rename them"),
    "quote.csv": (b'a,b\n1,"2\n', "not valid CSV"),
    "latin.txt": ("é".encode("latin-1"), "not UTF-8 text"),
    "rows.xlsx": (b"x", r"unknown kind of data file '\.xlsx': convert it, .*; known are \.jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_the_line(tmp_path: Path, name: str) -> None:
    content, said = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        list(read_rows(tmp_path / name, name))
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"^a: several columns are called text: rename them"):
        list(read_rows(tmp_path / "a.parquet", "a"))


def test_detection() -> None:
    assert detect_format({"text": "", "x": ""}, {}, "f:1") == "text"
    assert detect_format({"text": "", "prompt": "", "completion": ""}, {}, "f:1") == "prompt_completion"
    assert detect_format({"messages": [], "prompt": "", "completion": ""}, {}, "f:1") == "messages"
    assert detect_format({"q": "", "a": ""}, {"prompt": "q", "completion": "a"}, "f:1") == "prompt_completion"
    with pytest.raises(ConfigError, match=r"f:1 has the columns question, answer, none of the formats fits"):
        detect_format({"question": "", "answer": ""}, {}, "f:1")


def test_columns_are_renamed_and_unknown_ones_refused() -> None:
    row = {"q": "why?", "a": "so", "key": 7}
    got = normalise(row, "f:1", "prompt_completion", {"prompt": "q", "completion": "a", "id": "key"})
    assert got == Example({"prompt": "why?", "completion": "so"}, "why?", 6, "7")
    with pytest.raises(ConfigError, match=r"'promt' is not a column of prompt_completion \(did you mean prompt\?\)"):
        check_columns("prompt_completion", {"promt": "q"})
    check_columns("auto", {"prompt": "q", "context": "c", "id": "key"})
    with pytest.raises(ConfigError, match=r"'promt' is not a column of any format \(did you mean prompt\?\)"):
        check_columns("auto", {"promt": "q", "completion": "a"})


def test_a_missing_column_is_named_with_what_there_is() -> None:
    with pytest.raises(DataError) as caught:
        normalise({"promt": "a", "completion": "b"}, "rows.jsonl:3", "prompt_completion", {})
    message = str(caught.value)
    assert message.startswith("rows.jsonl:3: no column 'prompt' (did you mean 'promt'?); it has promt, completion")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("hello", "holds text, expected a list"),
        ([{"role": "user"}], "message 1 of 'messages' has role, expected role and content"),
        ([{"role": "human", "content": "x"}], "has the role 'human', expected one of system, user, assistant, tool"),
        ([{"role": "user", "content": 5}], "holds a number, expected text"),
        ([{"role": "assistant", "content": "", "tool_calls": [1]}], "has tool_calls"),
        ([{"role": "assistant", "content": "Hi", "weight": 0}], "message 1 of 'messages' has weight 0, which is not"),
        ([{"role": "assistant", "content": None, "function_call": {"name": "f"}}], "write it as tool_calls"),
        (
            [{"role": "assistant", "content": None, "refusal": "I cannot."}],
            "has refusal 'I cannot.', which is not read",
        ),
    ],
)
def test_bad_conversations(value: Any, said: str) -> None:
    with pytest.raises(DataError, match=r"^f:1: ") as caught:
        normalise({"messages": value}, "f:1", "messages", {})
    assert said in str(caught.value)


def test_conversations() -> None:
    turns = [("system", "be kind"), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Bye!")]
    messages = [{"role": r, "content": c} for r, c in turns]
    more = {"name": "n", "weight": 1, "refusal": None, "function_call": None}
    got = normalise({"messages": [{**m, **more} for m in messages]}, "f:1", "messages", {})
    assert got == Example({"messages": messages}, "Hi\nBye", 21, None)
    assert normalise({"messages": messages[:2]}, "f:1", "messages", {}) == Dropped("no_assistant_turn")


def test_padding_of_tokens_is_left_out_and_masks_must_agree() -> None:
    def read(**columns: Any) -> Any:
        return normalise({"input_ids": [1, 2, 3, 0, 0], **columns}, "f:1", "pretokenized", {})

    attention = [1, 1, 1, 0, 0]
    assert read(attention_mask=attention).columns == {"input_ids": [1, 2, 3], "loss_mask": [True] * 3}
    assert read(attention_mask=attention, labels=[-100, 2, 3, -100, -100]).columns["loss_mask"] == [False, True, True]
    assert read(attention_mask=[0] * 5) == Dropped("empty")
    both = {"loss_mask": [False, True, True, False, False], "labels": [-100, 2, 3, -100, -100]}
    assert read(**both).columns["loss_mask"] == both["loss_mask"]
    with pytest.raises(DataError, match="'loss_mask' and 'labels' supervise other tokens"):
        read(**{**both, "labels": [1, 2, 3, 0, 0]})
    with pytest.raises(DataError, match="holds True, expected integers"):
        normalise({"input_ids": [True, 2]}, "f:1", "pretokenized", {})


def test_an_answer_that_is_a_number_and_a_text() -> None:
    """A file of JSON tells the number from the text; one of CSV does not."""
    row = {"question": "How many?", "choices": ["1", "2", "3", "4"]}
    assert normalise({**row, "answer": 2}, "f:1", "multiple_choice", {}).columns["completion"] == " C. 3"
    with pytest.raises(DataError, match=r"'2', the text of one choice and the number of another, '3': .* \(B or C\)"):
        normalise({**row, "answer": "2"}, "f:1", "multiple_choice", {})
    assert normalise({**row, "answer": "4"}, "f:1", "multiple_choice", {}).columns["completion"] == " D. 4"


def test_empty_answers_are_dropped() -> None:
    assert normalise({"text": " \n"}, "f:1", "text", {}) == Dropped("empty")
    assert normalise({"text": None}, "f:1", "text", {}) == Dropped("empty")
    assert normalise({"prompt": "a", "completion": ""}, "f:1", "prompt_completion", {}) == Dropped("empty")
    with pytest.raises(DataError, match="column 'text' holds a number, expected text"):
        normalise({"text": 3}, "f:1", "text", {})
