"""Rows that break their format: named by file and line, and set aside where that is asked for; odd but sound ones."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from dayzero.config import Tokenize
from dayzero.data import json_rows, rejects
from dayzero.data.documents import DocumentEncoder
from dayzero.data.stored_table import batch_rows
from dayzero.stages import fetch_data
from transformers import AutoTokenizer

from tests.tiny_tokenizer import tiny_tokenizer

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
LINES = [
    json.dumps(GOOD),
    '{"messages": [',
    "[1, 2]",
    '{"text": "another schema"}',
    '{"messages": [{"role": "user", "content": 3}]}',
    '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}',
    json.dumps(GOOD).replace("Hello", "Good day"),
]
REASONS = {
    2: "not valid JSON (Expecting value",
    3: "a row must be a JSON object, found list",
    4: "no column 'messages'; it has text: set data.columns",
    5: "message 1 of 'messages': content holds a number, expected text",
    6: "half of a surrogate pair",
}


def run(output: Path, **data: Any) -> int:
    config = json.dumps({"data": {"validation_size": 0, **data}})
    return fetch_data.main(["--config", config, "--output", str(output)])


def rows(output: Path) -> list[dict[str, Any]]:
    return pq.read_table(output / "train.parquet").to_pylist()


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_bad_rows_are_set_aside_or_fail(tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = "\n".join(LINES).encode().replace(b'"Hi"', b'"\xff"', 1) + b"\n" + LINES[0].encode()
    packed = {"gz": gzip.compress, "zst": zstandard.compress}.get(ending.rpartition(".")[2], bytes)(content)
    file = tmp_path / f"rows.{ending}"
    file.write_bytes(packed)
    assert run(tmp_path / "out", source=str(file)) == 1
    assert f"{file}:1: not UTF-8 text" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    # the format is told by the first row that can be read
    assert run(tmp_path / "out", source=str(file), format="messages", on_bad_row="reject") == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["rejected"]["rows"], manifest["rejected"]["by_file"]) == (6, {str(file): 6})
    aside = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [r["origin"] for r in aside] == [f"{file}:{n}" for n in range(1, 7)]
    for row in aside[1:]:
        assert REASONS[int(row["origin"].rpartition(":")[2])] in row["reason"]
    assert not any("on_bad_row" in row["reason"] for row in aside), "that has been done"
    assert aside[2]["row"] == "[1, 2]\n"
    assert aside[3]["row"] == {"text": "another schema"}
    assert [r["origin"] for r in rows(tmp_path / "out")] == [f"{file}:7", f"{file}:8"]


@pytest.mark.parametrize("line", REASONS)
def test_a_bad_row_fails_the_stage_by_default(tmp_path: Path, line: int, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(LINES[0] + "\n" * (line - 1) + LINES[line - 1])
    assert run(tmp_path / "out", source=str(file)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{file}:{line}: " in last
    assert REASONS[line] in last
    assert ("or, where other rows have it, set such ones aside (data.on_bad_row: reject)" in last) == (line == 4)
    assert not list(tmp_path.glob("*out*/*"))


def test_csv_and_json_rows_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\na,b\nonly\n"x\ny",z\n1,2,3\n')
    (tmp_path / "b.json").write_text('[{"prompt": "p", "completion": "c"}, 5]')
    assert run(tmp_path / "out", source=[str(tmp_path / "a.csv"), str(tmp_path / "b.json")], on_bad_row="reject") == 0
    aside = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [r["origin"].rpartition("/")[2] for r in aside] == ["a.csv:3", "a.csv:6", "b.json:1#2"]
    assert [r["row"] for r in aside] == [["only"], ["1", "2", "3"], 5]
    assert [r["completion"] for r in rows(tmp_path / "out")] == ["b", "z", "c"]


def aside(output: Path) -> list[tuple[str, str, Any]]:
    """What was set aside: file name and line, reason, content."""
    found = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    return [(r["origin"].rpartition("/")[2], r["reason"], r["row"]) for r in found]


LONG = '{"text": "a", "n": ' + "9" * 5000 + "}"
DEEP = json.dumps(GOOD).replace("}]}", ', "tool_calls": [{"function": {"name": "f", "arguments": "DEEP"}}]}]}')
DEEP = DEEP.replace("DEEP", '{\\"a\\": ' + "[" * 100_000 + "]" * 100_000 + "}")
NESTED = '{"text": ' + '{"a": ' * 900 + "1" + "}" * 901


@pytest.mark.parametrize(
    ("name", "content", "origin", "said"),
    [
        ("a.jsonl", f'{{"text": "x"}}\n{LONG}\n', "a.jsonl:2", "Exceeds the limit (4300 digits)"),
        ("a.json", f'{{"text": "x"}}\n{LONG}\n', "a.json:2", "Exceeds the limit (4300 digits)"),
        ("a.json", f'[{{"text": "x"}}, {LONG}\n, {{"text": "y"}}]', "a.json:1#2", "Exceeds the limit (4300 digits)"),
        ("a.jsonl", f"{json.dumps(GOOD)}\n{DEEP}\n", "a.jsonl:2", "is JSON that is nested too deeply"),
        ("a.jsonl", f'{{"text": "x"}}\n{NESTED}\n', "a.jsonl:2", "column 'text' holds an object"),
    ],
    ids=["long", "long_in_lines", "long_in_array", "deep_text", "nested"],
)
def test_rows_that_python_cannot_hold(
    tmp_path: Path, name: str, content: str, origin: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert run(tmp_path / "no", source=str(tmp_path / name)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"fetch_data: error: {tmp_path / origin}: " in last
    assert said in last
    assert run(tmp_path / "out", source=str(tmp_path / name), on_bad_row="reject") == 0
    [(where, reason, _)] = aside(tmp_path / "out")
    assert (where, said in reason) == (origin, True)
    assert len(rows(tmp_path / "out")) == content.count('"y"') + 1


def test_a_key_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last would count in silence; deeper down, in texts and under other spellings the name may well stand."""
    twice = '{"prompt": "a", "n": {"prompt": 1}, "\\u0070rompt": "b", "completion": "c"}'
    sound = '{"prompt": "\\"prompt\\"", "completion": "prompt", "more": [{"prompt": "a", "more": {"prompt": 1}}]}'
    many = json.dumps({"prompt": "p", "completion": "c", **{f"k{i}": i for i in range(json_rows.FEW_KEYS)}})
    for name, content in (
        ("a.jsonl", f'{sound}\n{twice}\n{many}\n{many[:-1]}, "k7": 8}}'),
        ("a.json", f'[{sound},\n{twice},\n{many},\n{many[:-1]}, "k7": 8}}]'),
    ):
        (tmp_path / name).write_text(content)
        assert run(tmp_path / "no", source=str(tmp_path / name)) == 1
        said = "the key 'prompt' is there twice: rename one, or leave one out"
        assert capsys.readouterr().err.strip().splitlines()[-1].endswith(f"{name}:2: {said}")
        assert run(tmp_path / f"out {name}", source=str(tmp_path / name), on_bad_row="reject") == 0
        found = [(origin, reason) for origin, reason, _ in aside(tmp_path / f"out {name}")]
        assert found == [(f"{name}:2", said), (f"{name}:4", said.replace("prompt", "k7"))]
        assert aside(tmp_path / f"out {name}")[0][2] == twice + ("\n" if name == "a.jsonl" else "")
        assert [row["prompt"] for row in rows(tmp_path / f"out {name}")] == ['"prompt"', "p"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.jsonl", "a.json", "array.json"])
def test_bytes_that_are_no_utf8(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One such row is set aside wherever it stands, also beyond what a reader has in its buffer."""
    texts = [f"{i}é" for i in range(5000)]
    lines = {
        "a.csv": ["text,n", *(f"{t},1" for t in texts)],
        "a.tsv": ["text\tn", *(f"{t}\t1" for t in texts)],
        "a.txt": texts,
        "array.json": ["[", *(json.dumps({"text": t}, ensure_ascii=False) + "," for t in texts[:-1]), '{"text": "é"}]'],
    }.get(name, [json.dumps({"text": t}, ensure_ascii=False) for t in texts])
    content = "\n".join(lines).encode().replace("4000é".encode(), "4000é".encode("latin-1"))
    (tmp_path / name).write_bytes(content)
    number = 4002 if name in ("a.csv", "a.tsv", "array.json") else 4001
    assert run(tmp_path / "no", source=str(tmp_path / name)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    at = 14 if "json" in name else 5
    assert f"/{name}:{number}: not UTF-8 text (" in last
    assert f" at byte {at + ('json' in name)} of the row): convert it to UTF-8" in last
    assert run(tmp_path / "out", source=str(tmp_path / name), on_bad_row="reject") == 0
    [(origin, _, row)] = aside(tmp_path / "out")
    assert (origin, "4000\ufffd" in row) == (f"{name}:{number}", True)
    assert len(rows(tmp_path / "out")) == 4999


def test_text_of_parquet_that_is_no_utf8(tmp_path: Path) -> None:
    data = pa.array([b"one", b"t\xe9", b"three"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, data.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    assert run(tmp_path / "no", source=str(tmp_path / "a.parquet")) == 1
    assert run(tmp_path / "out", source=str(tmp_path / "a.parquet"), on_bad_row="reject") == 0
    assert [(origin, "a value cannot be read" in reason) for origin, reason, _ in aside(tmp_path / "out")] == [
        ("a.parquet:2", True)
    ]
    assert [r["text"] for r in rows(tmp_path / "out")] == ["one", "three"]


def test_quotes_of_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row is named by its first line. After a broken one the reader goes on, where its end is known."""
    good = 'prompt,completion\np1,c1\n\n"two\nlines",c2\n'
    (tmp_path / "a.csv").write_text(good + '"a "word"",c3\n"b\nc" d,c4\np5,c5\n"x\ny"\n')
    assert run(tmp_path / "no", source=str(tmp_path / "a.csv")) == 1
    assert "a.csv:6: not valid CSV: ',' expected after '\"'" in capsys.readouterr().err.splitlines()[-1]
    assert run(tmp_path / "out", source=str(tmp_path / "a.csv"), on_bad_row="reject") == 0
    assert [(origin, row) for origin, _, row in aside(tmp_path / "out")] == [
        ("a.csv:6", '"a "word"",c3\n'),
        ("a.csv:7", '"b\nc" d,c4\n'),
        ("a.csv:10", ["x\ny"]),
    ]
    origins = [(r["origin"].rpartition("/")[2], r["completion"]) for r in rows(tmp_path / "out")]
    assert origins == [("a.csv:2", "c1"), ("a.csv:4", "c2"), ("a.csv:9", "c5")]
    (tmp_path / "b.csv").write_text(good + '"open,c3\np4,c4\np5,c5\n')
    assert run(tmp_path / "never", source=str(tmp_path / "b.csv"), on_bad_row="reject") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "b.csv:6: not valid CSV: a quote of the row that begins here is not closed" in last


def test_a_first_row_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ['{"hello": 1}', '{"instruction": "a", "output": "b"}', *(json.dumps({"text": t}) for t in "xyz")]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert run(tmp_path / "no", source=sources) == 1
    assert "b.jsonl:1 has the columns hello, none of the formats fits" in capsys.readouterr().err.splitlines()[-1]
    assert run(tmp_path / "out", source=sources, on_bad_row="reject") == 0
    assert [(origin, reason[:30]) for origin, reason, _ in aside(tmp_path / "out")] == [
        ("b.jsonl:1", "has the columns hello, none of"),
        ("b.jsonl:2", "is of format alpaca, kept as m"),
    ]
    assert [r["text"] for r in rows(tmp_path / "out")] == ["a", "x", "y", "z"]
    capsys.readouterr()
    (tmp_path / "b.jsonl").write_text("\n".join(lines[:1] * 3))
    assert run(tmp_path / "never", source=sources, on_bad_row="reject") == 1, "then it is no bad row"
    assert "name yours in data.columns" in capsys.readouterr().err.splitlines()[-1]
    assert run(tmp_path / "never", source=sources, columns={"promt": "hello"}, on_bad_row="reject") == 1
    [*before, last] = capsys.readouterr().err.splitlines()
    assert "error: data.columns: 'promt' is not a column of any format (did you mean prompt?)" in last
    assert not any("rejected" in line for line in before), "it is no row's fault"


def test_only_bad_rows_is_an_error_and_none_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rejects, "SHOWN", 2)
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n' * 5)
    assert run(tmp_path / "out", source=str(tmp_path / "bad.jsonl"), on_bad_row="reject") == 1
    said = capsys.readouterr().err
    assert "all 5 rows are set aside, so none is left; the first is " in said
    assert said.count("fetch_data: rejected ") == 2
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
    assert run(tmp_path / "out", source=str(tmp_path / "good.jsonl"), on_bad_row="reject") == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["rejected"] == {"rows": 0}
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


@pytest.mark.parametrize("ending", ["gz", "zst", "bz2", "xz"])
def test_a_cut_off_file_fails_even_where_rows_may_be_bad(
    tmp_path: Path, ending: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = "".join(json.dumps({"text": f"{i * 7919 % 1000003}"}) + "\n" for i in range(5000)).encode()
    compress = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}[ending]
    packed = compress(content)
    (tmp_path / f"rows.jsonl.{ending}").write_bytes(packed[: len(packed) // 2])
    assert run(tmp_path / "out", source=str(tmp_path / f"rows.jsonl.{ending}"), on_bad_row="reject") == 1
    assert "damaged or cut off" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


ODD = ["👩‍👩‍👧 e\u0301 🇩🇪", "a\r\nb\rc", "nul \x00 inside", "\ufeffbom", "\u202eright to left", " \t ", "\u2028line"]


def test_odd_texts_survive_every_kind_of_file(tmp_path: Path) -> None:
    table = [{"prompt": text, "completion": f"{n}{text}"} for n, text in enumerate(ODD)]
    jsonl = "\r\n".join(json.dumps(row, ensure_ascii=n % 2 == 0) for n, row in enumerate(table))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl.encode())
    (tmp_path / "b.json").write_text(json.dumps(table), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "c.parquet")
    out = io.StringIO()
    writer = csv.DictWriter(out, ["prompt", "completion"], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(table)
    (tmp_path / "d.csv").write_bytes(out.getvalue().encode("utf-8-sig"))
    for name in ("a.jsonl", "b.json", "c.parquet", "d.csv"):
        assert run(tmp_path / f"{name}.out", source=str(tmp_path / name)) == 0
        got = [{k: r[k] for k in ("prompt", "completion")} for r in rows(tmp_path / f"{name}.out")]
        assert got == table, name


def test_large_rows(tmp_path: Path) -> None:
    """A line of a megabyte and a row of ten, to tokens and back; large rows are not held a thousand at a time."""
    words = "the quick brown fox ☃ " * 45_000
    assert len(words.encode()) > 2**20
    (tmp_path / "line.txt").write_text(words)
    with open(tmp_path / "rows.jsonl", "w") as f:
        f.write(json.dumps({"text": words * 10}) + "\n" + json.dumps({"text": "small"}) + "\n")
    assert run(tmp_path / "out", source=[str(tmp_path / "line.txt"), str(tmp_path / "rows.jsonl")]) == 0
    texts = [r["text"] for r in rows(tmp_path / "out")]
    assert texts == [words, words * 10, "small"]
    assert batch_rows(10 * 2**20 * 1000, 1000) == 3
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "tokenizer"))
    encoder = DocumentEncoder(tokenizer, "text", Tokenize(seq_len=4096, long_documents="split"))
    [*parts] = encoder.encode({"text": texts[0]})
    assert tokenizer.decode([i for ids, _ in parts for i in ids.tolist()][1:-1]) == words


def test_bos_twice_and_empty_turns(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "tokenizer"))
    encoder = DocumentEncoder(tokenizer, "text", Tokenize())
    [(ids, _)] = encoder.encode({"text": tokenizer.bos_token + "fox"})
    assert ids.tolist().count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    encoder = DocumentEncoder(tokenizer, "messages", Tokenize())
    turns = [("system", ""), ("user", ""), ("assistant", ""), ("user", tokenizer.bos_token), ("assistant", "fox")]
    [(ids, mask)] = encoder.encode({"messages": [{"role": r, "content": c} for r, c in turns]})
    assert ids.tolist().count(tokenizer.bos_token_id) == 1
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids[mask].tolist().count(end) == 2
    [*nothing] = encoder.encode({"messages": [{"role": "system", "content": "Only a system."}]})
    assert nothing == []
    assert encoder.counts["dropped.few_labels"] == 1
