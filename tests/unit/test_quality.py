"""The data report finds what was put into the rows, and a contaminated split stops the stage."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dayzero.config import DataCheck
from dayzero.data import quality, spill
from dayzero.data.histogram import LengthHistogram
from dayzero.data.ngrams import words
from dayzero.data.quality import Contamination, check_split, questions, row_texts
from dayzero.stages import check_data as stage

WORDS = [f"{a}{b}{c}" for a in "bdgklm" for b in "aeiou" for c in "nrstz"]


def sentence(seed, length=20):
    return " ".join(np.random.default_rng(seed).choice(WORDS, length))


def same(a, b):
    found = words(pa.array([a, b]))
    of = [found.hashes[found.text == i].tolist() for i in range(2)]
    return of[0] == of[1]


def test_words_are_what_stands_between_other_signs_in_one_form():
    found = words(pa.array(["The fox, THE Fox!", None, "", "fox", "…", "a b\nc"]))
    assert found.text.tolist() == [0, 0, 0, 0, 3, 5, 5, 5]
    the, fox, the2, fox2, alone, *_ = found.hashes.tolist()
    assert (the, fox) == (the2, fox2)
    assert fox == alone != the
    assert same("\uff26\uff55\uff4c\uff4c width \ufb01", "full WIDTH fi")
    assert same("Ÿ-naïve", "ÿ naïve")
    assert not same("naive", "naïve")
    assert not same("a bc", "ab c")
    assert len(words(pa.array(["東京に行く", "ไป"])).hashes) == 7, "scripts without spaces: a sign is a word"
    assert len(set(words(pa.array([" ".join(WORDS)])).hashes.tolist())) == len(WORDS)


def test_ngrams_stay_within_their_text():
    grams, text = words(pa.array(["a b c d", "b c", "a b", "x a b c"])).ngrams(3)
    assert text.tolist() == [0, 0, 3, 3]
    assert grams[0] == grams[3]
    assert len(set(grams.tolist())) == 3
    assert len(words(pa.array(["a"])).ngrams(3)[0]) == 0
    assert len(words(pa.array([], pa.string())).ngrams(3)[0]) == 0


def test_words_do_not_depend_on_what_stands_beside_them():
    texts = [sentence(i, 1 + i % 7) for i in range(50)]
    together = words(pa.array(texts))
    for i, text in enumerate(texts):
        assert together.hashes[together.text == i].tolist() == words(pa.array([text])).hashes.tolist()


def test_items_found_in_training_rows():
    items = [sentence(1), sentence(2), sentence(3), "too short", sentence(4)]
    rows = [sentence(100 + i) for i in range(30)]
    rows[7] = f"{sentence(50)} {items[0].upper().replace(' ', ', ')} {sentence(51)}"  # whole, in another dress
    rows[9] = " ".join(items[1].split()[:16])  # 9 of its 13 runs of 8 words: less than 70 %
    rows[20] = " ".join(items[4].split()[:18])  # 11 of 13
    found = Contamination({"a": items, "b": items[1:2]}, 8, 0.7)
    for start in (0, 10, 20):
        found.see(words(pa.array(rows[start : start + 10])), start)
    result = found.result()
    assert (result["a"]["items"], result["a"]["too_short"], result["a"]["contaminated"]) == (5, 1, 2)
    assert result["a"]["share"] == 2 / 5
    assert [(w["item"], w["train_row"], w["overlap"]) for w in result["a"]["worst"]] == [
        (0, 7, 1.0),
        (4, 20, round(11 / 13, 4)),
    ]
    assert result["b"]["contaminated"] == 0
    assert Contamination({"none": []}, 8, 0.7).result()["none"]["share"] == 0


def test_short_items_are_found_whole():
    """Where the run of all their words stands in a row; four words may stand anywhere."""
    items = [
        "Who wrote it, and when?",
        "Name four large rivers of it",
        "what then of it",
        "one two three four five six seven eight nine",
    ]
    rows = ["nothing of it", "a name; FOUR large rivers, of it", "who wrote. It: and when", "rivers what then of it"]
    found = Contamination({"a": items}, 8, 0.7)
    for start in (0, 2):
        found.see(words(pa.array(rows[start : start + 2])), start)
    result = found.result()["a"]
    assert (result["contaminated"], result["too_short"]) == (2, 1)
    assert [(w["item"], w["train_row"], w["overlap"]) for w in result["worst"]] == [(0, 2, 1.0), (1, 1, 1.0)]


def messages(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_texts_questions_and_blank_answers_of_each_kind():
    chats = [
        messages(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", " \n")),
        messages(("user", "x"), ("assistant", "y")),
    ]
    batch = pa.RecordBatch.from_pylist([{"messages": m} for m in chats])
    assert row_texts(batch, "messages").to_pylist() == ["s\nq\na\nr\n \n", "x\ny"]
    assert row_texts(batch.slice(1), "messages").to_pylist() == ["x\ny"]
    assert questions(batch, "messages") == ["q\nr", "x"]
    assert quality.empty_answers(batch, "messages") == 1
    call = {"role": "assistant", "content": "", "tool_calls": "[{}]"}
    assert quality.empty_answers(pa.RecordBatch.from_pylist([{"messages": [call]}]), "messages") == 0
    batch = pa.RecordBatch.from_pylist([{"prompt": "p", "completion": "c"}, {"prompt": None, "completion": "\u3000"}])
    assert row_texts(batch, "prompt_completion").to_pylist() == ["p\nc", "\n\u3000"]
    assert questions(batch, "prompt_completion") == ["p", ""]
    assert quality.empty_answers(batch, "prompt_completion") == 1
    batch = pa.RecordBatch.from_pylist([{"text": "t", "question": "asked"}, {"text": "", "question": "b"}])
    assert row_texts(batch, "text").to_pylist() == ["t", ""]
    assert questions(batch, "text") == ["asked", "b"]
    assert quality.empty_answers(batch, "text") == 1


def write(path, texts):
    origins = [f"{path.stem}.jsonl:{i + 1}" for i in range(len(texts))]
    pq.write_table(pa.table({"origin": origins, "text": pa.array(texts, pa.string())}), path, row_group_size=16)
    return path


def test_calls_and_tools_are_text_of_their_row():
    """Rows that differ in nothing else are no copies of one another."""

    def row(calls, tools):
        asked = {"role": "user", "content": "Go", "tool_calls": None}
        return {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": calls}], "tools": tools}

    rows = [row('[{"a": 1}]', "[1]"), row('[{"a": 2}]', "[1]"), row('[{"a": 1}]', None), row(None, None)]
    batch = pa.RecordBatch.from_pylist(rows)
    assert row_texts(batch, "messages").to_pylist() == [
        'Go\n\n[{"a": 1}]\n[1]',
        'Go\n\n[{"a": 2}]\n[1]',
        'Go\n\n[{"a": 1}]',
        "Go\n",
    ]


def test_rows_with_other_tools_are_no_copies(tmp_path):
    rows = [{"messages": messages(("user", "Go"), ("assistant", "Gone")), "tools": f"[{i}]"} for i in range(3)]
    pq.write_table(pa.Table.from_pylist([*rows, rows[0]]), tmp_path / "t.parquet")
    report = check_split(tmp_path / "t.parquet", "messages", DataCheck(), "train", tmp_path)
    assert report["exact_duplicates"]["found"] == 1
    assert report["characters"]["total"] == 4 * len("Go\nGone\n[0]")


def test_a_split_with_known_faults(tmp_path):
    texts = [sentence(i, 60) for i in range(200)]
    texts[10] = texts[150] = texts[3]  # two copies
    words_of = texts[20].split()
    texts[190] = " ".join([*words_of[:-1], "other"])  # one word of 60 changed
    texts[5] = "  "
    report = check_split(write(tmp_path / "t.parquet", texts), "text", DataCheck(), "train", tmp_path)
    assert report["rows"] == 200
    assert report["empty_answers"] == 1
    assert report["exact_duplicates"] == {"found": 2, "looked_at": 200, "share": 0.01}
    assert report["near_duplicates"]["found"] == 1
    assert report["near_duplicates"]["looked_at"] == 197
    assert report["characters"]["total"] == sum(map(len, texts))
    assert report["characters"]["longest"] == max(map(len, texts))
    assert sum(report["languages"].values()) == 200
    assert report["languages"]["none"] == 1


def test_more_rows_than_are_looked_at_are_sampled_with_their_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(spill, "HELD_BYTES", 1000)
    texts = [sentence(i % 500, 12) for i in range(2000)]
    report = check_split(write(tmp_path / "t.parquet", texts), "text", DataCheck(sample_rows=300), "train", tmp_path)
    assert report["exact_duplicates"] == {"found": 1500, "looked_at": 2000, "share": 0.75}
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]
    assert report["near_duplicates"]["looked_at"] < 200
    assert report["near_duplicates"]["found"] == 0


def near_duplicates(tmp_path, texts, sample_rows=200):
    check = DataCheck(sample_rows=sample_rows)
    return check_split(write(tmp_path / "t.parquet", texts), "text", check, "train", tmp_path)["near_duplicates"]


def test_pairs_and_crowds_of_near_duplicates_are_found_among_a_share_of_the_rows(tmp_path, monkeypatch):
    """Half of the rows are like an earlier one, and so are half of those looked at."""
    monkeypatch.setattr(spill, "HELD_BYTES", 1000)
    pairs = [f"{sentence(i // 2, 40)} end{i}" for i in range(1000)]
    crowd = [f"{sentence(i * (i % 2), 40)} end{i}" for i in range(1000)]
    for texts in (pairs, crowd):
        found = near_duplicates(tmp_path, texts)
        assert found["share"] == pytest.approx(0.5, abs=0.1)
        assert found["looked_at"] == pytest.approx(200, abs=80)
        assert near_duplicates(tmp_path, texts[::-1]) == found, "whatever the order of rows"
    assert near_duplicates(tmp_path, pairs, 1000)["share"] == pytest.approx(0.5, abs=0.02)


def test_languages():
    texts = {
        "en": "The quick brown fox jumps over the lazy dog and then goes home to sleep.",
        "de": "Der schnelle braune Fuchs springt über den faulen Hund und geht dann nach Hause.",
        "ru": "Быстрая коричневая лиса прыгает через ленивую собаку и идёт домой.",
        "none": "12 + 34 = 46 …",
    }
    assert {quality.language(text): text for text in texts.values()} == texts


def test_length_histogram():
    histogram = LengthHistogram()
    histogram.add(np.array([0, 1, 2, 3, 4, 7, 8]))
    assert histogram.result() == {"counts": [1, 1, 2, 2, 1], "longest": 8, "total": 25}
    histogram.add(np.array([], dtype=np.int64))
    assert histogram.result()["counts"] == [1, 1, 2, 2, 1]


@pytest.fixture
def data(tmp_path):
    """Forty training rows, of which two hold test items, among twenty test items."""
    folder = tmp_path / "data"
    folder.mkdir()
    test = [sentence(i) for i in range(20)]
    train = [sentence(100 + i) for i in range(38)] + [test[3], f"{sentence(70)} {test[4]}"]
    write(folder / "train.parquet", train)
    write(folder / "test.parquet", test)
    splits = {name: {"file": f"{name}.parquet"} for name in ("train", "test")}
    (folder / "manifest.json").write_text(json.dumps({"format": "text", "splits": splits}))
    return folder


TASK = """
task: held_out
dataset_path: parquet
dataset_kwargs:
  data_files: {test: "{data}/test.parquet"}
  cache_dir: "{cache}"
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
"""


def run(data, tasks_dir, **check):
    config = {"data_check": check, "tasks": ["held_out"]}
    out = data.parent / "out"
    options = ["--data", str(data), "--tasks-dir", str(tasks_dir), "--output", str(out)]
    return stage.main(["--config", json.dumps(config), *options]), out


def test_the_stage_stops_at_contamination_unless_allowed(data, tmp_path, capsys):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "held_out.yaml").write_text(TASK)
    code, out = run(data, tasks)
    assert code == 1
    assert not out.exists()
    *_, named, last = capsys.readouterr().err.strip().splitlines()
    assert "item 4 stands in train.jsonl:40: " in named
    assert "2 of 20 items of the test split (10.0 %) stand in training rows (train.jsonl:39, train.jsonl:40), " in last
    assert "data_check.max_contamination: null" in last
    for allowed in (0.1, None):
        code, out = run(data, tasks, max_contamination=allowed)
        assert code == 0
    manifest = json.loads((out / "manifest.json").read_text())
    for found in manifest["contamination"]["tasks"].values():
        assert (found["items"], found["contaminated"], found["too_short"]) == (20, 2, 0)
        assert {(w["item"], w["train_row"]) for w in found["worst"]} == {(3, 38), (4, 39)}
        assert [w["origin"] for w in found["worst"]] == ["train.jsonl:39", "train.jsonl:40"]
    assert manifest["contamination"]["tasks"].keys() == {"the test split", "held_out"}
    assert manifest["splits"]["train"]["rows"] == 40


def test_rows_without_text_are_not_looked_at(data, tmp_path):
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps({**manifest, "format": "pretokenized"}))
    code, out = run(data, tmp_path)
    assert code == 0
    assert json.loads((out / "manifest.json").read_text())["splits"] == {}
