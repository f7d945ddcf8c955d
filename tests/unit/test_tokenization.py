"""Documents become files; whatever is left out is counted; workers change nothing."""

import gc
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dayzero.config import Tokenize
from dayzero.data import tokenization
from dayzero.data.stored_table import open_table, rows_of
from dayzero.data.tokenization import tokenize_split
from dayzero.data.tokenizer import TokenizerSource
from dayzero.data.tokens import IGNORE, TokenRows
from dayzero.errors import ConfigError, DataError
from dayzero.stages import tokenize as stage
from transformers import AutoTokenizer

from tests.encoded_rows import documents, sentences
from tests.tiny_tokenizer import CHATML, tiny_tokenizer
from tests.token_store import num_documents, num_label_tokens


def parquet(path, **columns):
    count = len(next(iter(columns.values())))
    identity = {"id": [str(i) for i in range(count)], "origin": [f"rows.jsonl:{i + 1}" for i in range(count)]}
    pq.write_table(pa.table({**identity, **columns}), path, row_group_size=100)
    return path


def run(source, output, tokenizer, data_format="text", num_workers=1, **options):
    spec = TokenizerSource(tokenizer)
    counts = tokenize_split(
        source,
        output,
        name="train",
        data_format=data_format,
        tokenizer=spec,
        options=Tokenize(**{"seq_len": 128, **options}),
        num_workers=num_workers,
    )
    return counts, TokenRows(output)


def test_the_store_holds_exactly_the_documents(tmp_path, tokenizer_path, tokenizer):
    texts = sentences(300)
    source = parquet(tmp_path / "train.parquet", text=texts)
    counts, rows = run(source, tmp_path / "out", tokenizer_path)
    assert counts["documents"] == counts["source_rows"] == num_documents(rows) == 300
    assert (counts["rows"], counts["tokens"]) == (len(rows), rows.num_tokens)
    assert counts["packing_efficiency"] == rows.num_tokens / (len(rows) * 128) > 0.9
    assert counts["label_tokens"] == sum(num_label_tokens(rows)) == rows.num_tokens - 300
    seen = {}
    for i in range(len(rows)):
        row = rows.row(i)
        assert len(row.input_ids) <= 128
        starts = np.flatnonzero(row.position_ids == 0)
        parts = np.split(np.arange(len(row.input_ids)), starts[1:])
        for document, part in zip(row.document_ids.tolist(), parts, strict=True):
            assert document not in seen
            seen[document] = tokenizer.decode(row.input_ids[part][1:-1])
            assert row.labels[part].tolist() == [*row.input_ids[part][1:].tolist(), IGNORE]
    assert [seen[i] for i in range(300)] == texts
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "document_ids.npy",
        "document_offsets.npy",
        "input_ids.npy",
        "loss_mask.npy",
        "row_offsets.npy",
    ]


def test_without_packing_a_row_is_a_document_in_file_order(tmp_path, tokenizer_path):
    source = parquet(tmp_path / "train.parquet", text=sentences(50))
    counts, rows = run(source, tmp_path / "out", tokenizer_path, packing=False)
    assert counts["rows"] == counts["documents"] == 50
    assert rows.source_rows(range(50)) == list(range(50))


def test_rows_read_by_column_are_those_that_arrow_gives():
    messages = [
        [{"role": "user", "content": "a", "name": None}, {"role": "assistant", "content": "☃", "name": "b"}],
        None,
        [],
        [{"role": "user", "content": None, "name": None}],
    ]
    ids = [[1, 2], [], None, [3]]
    odd = [[1, None], [], None, [2]]
    mask = [[True, False], [], [True], None]
    table = pa.table({"id": list("abcd"), "messages": messages, "input_ids": ids, "loss_mask": mask, "odd": odd})
    nothing = pa.array([[{}], [], [{}, {}], [{}]], pa.list_(pa.struct([])))
    nobody = pa.array([[{"role": "user"}, None], [], None, []], pa.list_(pa.struct([("role", pa.string())])))
    batch = pa.RecordBatch.from_arrays(
        [*table.to_batches()[0].columns, nothing, nobody], [*table.column_names, "nothing", "nobody"]
    )
    for part in (batch, batch.slice(1), batch.slice(2, 1), batch.slice(0, 0)):
        found = [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in rows_of(part)]
        assert found == part.to_pylist()


@pytest.mark.parametrize("copied", [True, False], ids=["copies of this process", "processes of a server"])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path, tokenizer_path, monkeypatch, copied):
    monkeypatch.setattr(tokenization, "_can_be_copied", lambda: copied)
    for name in ("BYTES_PER_WORKER", "BYTES_PER_SERVED_WORKER"):
        monkeypatch.setattr(tokenization, name, 10_000)
    monkeypatch.setattr(tokenization, "SMALLEST_TASK", 5_000)
    source = parquet(tmp_path / "train.parquet", text=sentences(350))
    asked = []
    in_processes = tokenization._encode_in_processes
    monkeypatch.setattr(tokenization, "_encode_in_processes", lambda *a: asked.append(a[-1]) or in_processes(*a))
    results = [run(source, tmp_path / str(n), tokenizer_path, num_workers=n, seq_len=64)[0] for n in (1, 2, 3)]
    assert asked == [2, 3]
    assert results[0] == results[1] == results[2]
    assert results[0]["truncated"] > 0
    for name in ("input_ids", "loss_mask", "document_offsets", "row_offsets", "document_ids"):
        one = (tmp_path / "1" / f"{name}.npy").read_bytes()
        assert one == (tmp_path / "2" / f"{name}.npy").read_bytes() == (tmp_path / "3" / f"{name}.npy").read_bytes()


def taken_by_a_collection(*_):
    """MiB that a full garbage collection takes this process for itself of what it shares with others."""

    def private():
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024

    before = private()
    gc.collect()
    return private() - before


@pytest.mark.skipif(sys.platform != "linux", reason="processes are copies on Linux only")
def test_copies_of_this_process_share_its_objects_to_the_end(tmp_path, tokenizer_path, monkeypatch):
    monkeypatch.setattr(tokenization, "_can_be_copied", lambda: True)
    monkeypatch.setattr(tokenization, "_encode_task", taken_by_a_collection)
    file = open_table(parquet(tmp_path / "train.parquet", text=["fox"]))
    many = [[n] for n in range(500_000)]  # 40 MiB that collections look through
    setup = (TokenizerSource(tokenizer_path), "text", Tokenize(), False)
    (taken,) = tokenization._encode_in_processes(file, setup, 2)
    assert taken < 10
    assert gc.get_freeze_count() == 0
    assert len(many) == 500_000


def test_a_workers_error_reaches_the_user_with_the_row(tmp_path, tokenizer_path, monkeypatch):
    for name in ("BYTES_PER_WORKER", "BYTES_PER_SERVED_WORKER"):
        monkeypatch.setattr(tokenization, name, 100)
    source = parquet(tmp_path / "train.parquet", text=["fox", *[None] * 40])
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"row rows\.jsonl:2: no value in column text"):
            run(source, tmp_path / str(workers), tokenizer_path, num_workers=workers)


def test_bad_input_is_named(tmp_path, tokenizer_path):
    source = parquet(tmp_path / "train.parquet", text=["", ""])
    with pytest.raises(DataError, match=r"no document with a supervised token is left of 2 rows \(2 empty\)"):
        run(source, tmp_path / "a", tokenizer_path)
    with pytest.raises(DataError, match="needs the column prompt"):
        run(source, tmp_path / "b", tokenizer_path, data_format="prompt_completion")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"cannot read .*broken\.parquet"):
        run(tmp_path / "broken.parquet", tmp_path / "c", tokenizer_path)
    with pytest.raises(ConfigError, match="cannot load a tokenizer from"):
        run(source, tmp_path / "d", tmp_path)


def test_what_may_have_left_nothing_is_named(tmp_path, tokenizer_path):
    """The settings of the loss among it, where they are set."""
    chat = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]]
    columns = {"messages": {"messages": chat}, "pretokenized": {"input_ids": [[1, 2]], "loss_mask": [[False] * 2]}}
    usual = "check the data's columns, tokenize.seq_len, long_documents"
    for data_format, options, said in (
        (
            "messages",
            {"loss_parts": "tool_arguments", "loss_turns": "last"},
            "min_label_tokens, loss_turns and loss_parts",
        ),
        ("messages", {"loss_roles": ["tool"]}, "min_label_tokens and loss_roles"),
        ("messages", {"min_label_tokens": 100}, "long_documents and min_label_tokens"),
        ("pretokenized", {}, "min_label_tokens and the rows' own labels"),
    ):
        source = parquet(tmp_path / f"{data_format}.parquet", **columns[data_format])
        with pytest.raises(DataError, match="no document with a supervised token is left") as error:
            run(source, tmp_path / "out", tokenizer_path, data_format, **options)
        assert usual in str(error.value)
        assert str(error.value).endswith(said)


def test_the_models_limits(tmp_path):
    path = tiny_tokenizer(tmp_path / "tokenizer")
    source = parquet(tmp_path / "train.parquet", text=sentences(5))
    config = {"text_config": {"max_position_embeddings": 64, "vocab_size": 200}}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"tokenize\.seq_len 128 exceeds the context length 64"):
        run(source, tmp_path / "a", path)
    with pytest.raises(ConfigError, match=r"token id \d+, beyond the model's vocab_size 200"):
        run(source, tmp_path / "b", path, seq_len=64)
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path / "no_eos"))
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no EOS token"):
        documents(tokenizer, "text", [])


@pytest.mark.parametrize("model", [{"vocab_size": 500}, None], ids=["of a model", "of a tokenizer"])
def test_ids_that_the_model_does_not_have_are_a_bad_row(tmp_path, capsys, model):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    limit = 500 if model else len(AutoTokenizer.from_pretrained(tokenizer))
    if model:
        (tokenizer / "config.json").write_text(json.dumps(model))
    ids = [[1, limit - 1, 2], [1, 2, limit, limit + 1] + [3] * 2000]  # of more numpy shows but the ends
    data = tmp_path / "data"
    data.mkdir()
    parquet(data / "train.parquet", input_ids=ids, loss_mask=[[True] * len(row) for row in ids])
    splits = {"train": {"file": "train.parquet"}}
    (data / "manifest.json").write_text(json.dumps({"format": "pretokenized", "splits": splits}))
    arguments = ["--data", str(data), "--tokenizer", str(tokenizer), "--output", str(tmp_path / "out")]
    assert stage.main(["--config", "{}", *arguments]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"row rows.jsonl:2: token 3 has the id {limit}, but the model's are below {limit}: " in last
    assert stage.main(["--config", '{"data": {"on_bad_row": "reject"}}', *arguments]) == 0
    assert json.loads((tmp_path / "out/manifest.json").read_text())["splits"]["train"]["dropped"] == {"rejected": 1}
    aside = json.loads((tmp_path / "out/train/rejected.jsonl").read_text())
    assert aside["origin"] == "rows.jsonl:2"
    assert "on_bad_row" not in aside["reason"], "that has been done"
    assert (aside["row"]["input_ids"], aside["row"]["loss_mask"]) == (ids[1], [True] * len(ids[1])), "to be repaired"


def messages_data(tmp_path, rows):
    data = tmp_path / "data"
    data.mkdir()
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in sentences(rows)
    ]
    for split, part in (("train", chats[3:]), ("validation", chats[:3])):
        parquet(data / f"{split}.parquet", messages=part)
    splits = {name: {"file": f"{name}.parquet"} for name in ("train", "validation")}
    (data / "manifest.json").write_text(json.dumps({"format": "messages", "splits": splits}))
    return data, chats


def test_the_stage(tmp_path, tokenizer_path, tokenizer):
    data, chats = messages_data(tmp_path, 20)
    output = tmp_path / "out"
    arguments = ["--config", '{"tokenize": {"seq_len": 512}}', "--data", str(data), "--tokenizer", str(tokenizer_path)]
    assert stage.main([*arguments, "--output", str(output), "--num-workers", "2"]) == 0
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["seq_len"] == 512
    assert manifest["splits"]["train"]["documents"] == 17
    assert manifest["eos_token_id"] == tokenizer.eos_token_id
    assert 0 < manifest["max_token_id"] < manifest["vocab_size"] == len(tokenizer)
    assert len(manifest["chat_template_sha256"]) == 64
    assert manifest["provenance"]["inputs"]["data"]
    rows = TokenRows(output / "validation", packed=False)
    answers = [tokenizer.decode(r.labels[r.labels != IGNORE]) for r in map(rows.row, range(3))]
    assert answers == [chats[i][1]["content"] + "<|im_end|>" for i in rows.source_rows(range(3))]


def test_what_is_dropped_is_told_as_what_it_is(tmp_path, tokenizer_path, capsys):
    """Pieces of split rows are documents."""
    data = tmp_path / "data"
    data.mkdir()
    parquet(data / "train.parquet", prompt=["fox " * 50, "", "a"], completion=["dog", "", "b"])
    manifest = {"format": "prompt_completion", "splits": {"train": {"file": "train.parquet"}}}
    (data / "manifest.json").write_text(json.dumps(manifest))
    arguments = ["--data", str(data), "--tokenizer", str(tokenizer_path), "--output", str(tmp_path / "out")]
    assert stage.main(["--config", '{"tokenize": {"seq_len": 16, "long_documents": "split"}}', *arguments]) == 0
    dropped = json.loads((tmp_path / "out/manifest.json").read_text())["splits"]["train"]["dropped"]
    said = capsys.readouterr().err
    assert f"train: {dropped['few_labels']} documents dropped: few_labels" in said
    assert "train: 1 rows dropped: empty" in said


def test_a_failed_stage_leaves_nothing_and_one_line(tmp_path, tokenizer_path, capsys):
    data, _ = messages_data(tmp_path, 5)
    plain = tiny_tokenizer(tmp_path / "plain", chat_template=None)
    for tokenizer, config, text in (
        (plain, {}, "no chat template"),
        (plain, {"model": {"chat_template": "no/such.jinja"}}, "model.chat_template no/such.jinja"),
        (
            tokenizer_path,
            {"tokenize": {"seq_len": 3}},
            "no document with a supervised token is left of 2 rows (2 few_labels)",
        ),
    ):
        arguments = ["--config", json.dumps(config), "--data", str(data), "--tokenizer", str(tokenizer)]
        assert stage.main([*arguments, "--output", str(tmp_path / "out")]) == 1
        assert text in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_faults_of_a_template_are_told_with_its_name(tmp_path, tokenizer_path, capsys):
    """One of its syntax once and at the start, also where rows may be bad; another with the row that it shows in."""
    data, _ = messages_data(tmp_path, 5)
    file = tmp_path / "own.jinja"
    syntax = f"tokenize: error: model.chat_template {file}:2: Encountered unknown tag 'endif'"
    refused = "tokenize: error: row rows.jsonl:1: the chat template refuses a conversation of user, assistant"
    for text, row, said in (
        ("{% for m in messages %}\n{% endif %}", "reject", syntax),
        ("\n{{ 1 // 0 }}", "fail", f"{refused} (ZeroDivisionError: integer division or modulo by zero; {file}, li"),
        ("{{ messages[0].x.y }}", "fail", f"{refused} ('dict object' has no attribute 'x'; {file}, line 1)"),
    ):
        file.write_text(text)
        config = {"model": {"chat_template": str(file)}, "data": {"on_bad_row": row}}
        arguments = ["--config", json.dumps(config), "--data", str(data), "--tokenizer", str(tokenizer_path)]
        assert stage.main([*arguments, "--output", str(tmp_path / "out")]) == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith(said)
        assert "rejected" not in "".join(lines)
    config["data"]["on_bad_row"] = "reject"
    arguments[1] = json.dumps(config)
    assert stage.main([*arguments, "--output", str(tmp_path / "out")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "all 2 rows are set aside, so none is left; the first is rows.jsonl:1: the chat template refuses" in last
    own = tiny_tokenizer(tmp_path / "broken", chat_template="{% if x %}")
    with pytest.raises(ConfigError, match=r"the chat template of the tokenizer in .*broken, line 1: Unexpected end"):
        documents(AutoTokenizer.from_pretrained(own), "messages", [])


@pytest.mark.parametrize("workers", ["1", "2"])
def test_conversations_that_the_template_refuses_are_set_aside(tmp_path, capsys, monkeypatch, workers):
    monkeypatch.setattr(tokenization, "BYTES_PER_WORKER", 1000)
    alternating = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with a user') }}{% endif %}" + CHATML
    tokenizer = tiny_tokenizer(tmp_path / "strict", chat_template=alternating)
    data, chats = messages_data(tmp_path, 23)
    for chat in chats[4::5]:
        chat.reverse()
    parquet(data / "train.parquet", messages=chats[3:])
    arguments = ["--data", str(data), "--tokenizer", str(tokenizer), "--num-workers", workers]
    assert stage.main(["--config", "{}", *arguments, "--output", str(tmp_path / "never")]) == 1
    assert "row rows.jsonl:2: the chat template refuses" in capsys.readouterr().err
    config = json.dumps({"data": {"on_bad_row": "reject"}})
    assert stage.main(["--config", config, *arguments, "--output", str(tmp_path / "out")]) == 0
    split = json.loads((tmp_path / "out/manifest.json").read_text())["splits"]["train"]
    aside = [json.loads(line) for line in (tmp_path / "out/train/rejected.jsonl").read_text().splitlines()]
    refused = [i for i, chat in enumerate(chats[3:]) if chat[0]["role"] == "assistant"]
    assert [row["origin"] for row in aside] == [f"rows.jsonl:{i + 1}" for i in refused]
    assert all("begin with a user" in row["reason"] for row in aside)
    assert aside[0]["row"]["messages"] == chats[4]
    assert split["dropped"] == {"rejected": len(refused)}
    assert split["rejected"]["rows"] == len(refused)
    assert split["documents"] == 20 - len(refused)
