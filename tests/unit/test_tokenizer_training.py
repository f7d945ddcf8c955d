"""A trained tokenizer is lossless, reproducible, and an ordinary Hugging Face directory."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dayzero.data.tokenizer_training import BOS, EOS, save_tokenizer, train_tokenizer
from dayzero.errors import ConfigError
from dayzero.stages import train_tokenizer as stage
from transformers import AutoTokenizer

from tests.tiny_tokenizer import TEXT


@pytest.mark.parametrize("text", ["", "The fox.", "  two  spaces \n\n", "☃ 日本語 \x00 \u200b e\u0301", "a" * 5000])
def test_every_text_comes_back(tmp_path, text):
    save_tokenizer(train_tokenizer(iter(TEXT), 300), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids[1:]) == text
    assert max(ids) < len(tokenizer) <= 300


def test_training_is_reproducible_and_learns(tmp_path):
    first, second = (train_tokenizer(iter(TEXT), 400) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first(TEXT[0])["input_ids"]) < len(TEXT[0].encode()) / 2
    assert (first.bos_token, first.eos_token, first.pad_token) == (BOS, EOS, EOS)


def test_a_vocabulary_without_room_for_all_bytes():
    assert len(train_tokenizer(iter(TEXT), 258)) == 258
    with pytest.raises(ConfigError, match="vocab_size 257 is below 258"):
        train_tokenizer(iter(TEXT), 257)


def data_directory(path, data_format, column, values):
    path.mkdir()
    pq.write_table(pa.table({column: values}), path / "train.parquet")
    (path / "manifest.json").write_text(
        json.dumps({"format": data_format, "splits": {"train": {"file": "train.parquet"}}})
    )
    return path


def test_the_stage(tmp_path, capsys):
    chats = [[{"role": "user", "content": text}] for text in TEXT]
    config = json.dumps({"model": {"tokenizer": {"vocab_size": 300}}, "data": {"source": "x"}})
    for name, *data in (("text", "text", "text", TEXT), ("chat", "messages", "messages", chats)):
        directory = data_directory(tmp_path / name, *data)
        output = tmp_path / f"{name}_out"
        assert stage.main(["--config", config, "--data", str(directory), "--output", str(output)]) == 0
        manifest = json.loads((output / "manifest.json").read_text())
        assert manifest["vocab_size"] == len(AutoTokenizer.from_pretrained(output)) == 300
        assert "tokenizer.json" in manifest["files"]
    same = [(tmp_path / f"{name}_out" / "tokenizer.json").read_bytes() for name in ("text", "chat")]
    assert same[0] == same[1], "the words of a conversation are the text"
    assert stage.main(["--config", "{}", "--data", str(tmp_path / "text"), "--output", str(tmp_path / "no")]) == 1
    assert "model.tokenizer is null" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
