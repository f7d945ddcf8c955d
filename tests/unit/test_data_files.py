"""Files that rows come in besides lines of text: Arrow, Megatron, folders, compressed ones."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import shutil
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from dayzero.data import megatron
from dayzero.data.megatron import documents
from dayzero.errors import DataError

from tests.unit.test_data_formats import EXAMPLES, fetch


def test_arrow_files_and_saved_data_sets(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(5)]
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as f, pa.ipc.new_file(f, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for source in ("file.arrow", "saved"):
        _, got = fetch(tmp_path / f"{source}.out", source=str(tmp_path / source))
        assert [(r["prompt"], r["completion"]) for r in got] == [("q" + str(i), "a") for i in range(5)]
    assert got[2]["origin"].endswith(":3")


def test_megatron_documents_of_several_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.array([7, 8, 9, 70000, 11], dtype=np.int32)
    (tmp_path / "d.bin").write_bytes(tokens.tobytes())
    lengths, pointers, bounds = [2, 1, 2], [0, 8, 12], [0, 2, 2, 3]

    def index(code: int = 4, pointers: list[int] = pointers, bounds: list[int] = bounds) -> bytes:
        head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, 3, 4)
        return head + struct.pack("<3i3q4q", *lengths, *pointers, *bounds)

    def read(content: bytes) -> list[list[int]]:
        (tmp_path / "d.idx").write_bytes(content)
        return [ids.tolist() for ids in documents(tmp_path / "d.idx", "d.idx")]

    assert read(index()) == [[7, 8, 9], [], [70000, 11]]
    monkeypatch.setattr(megatron, "BLOCK", 2)
    assert read(index()) == [[7, 8, 9], [], [70000, 11]]
    for content, said in (
        (b"nothing of the kind, but long enough", "does not begin with MMIDIDX"),
        (index()[:-1], "the file is cut off"),
        (index(code=6), "ids of type 6"),
        (index(pointers=[0, 8, 16]), "points beyond the 20 bytes of d.bin"),
        (index(bounds=[0, 2, 2, 2]), "do not cover its 3 sequences"),
    ):
        with pytest.raises(DataError, match=rf"^d\.idx: .*{said}"):
            read(content)
    (tmp_path / "d.bin").unlink()
    with pytest.raises(DataError, match=r"there is no d\.bin beside it"):
        read(index())


def test_a_long_index_takes_no_memory(tmp_path: Path) -> None:
    """Documents come one at a time, and so does what says where they lie: 20 bytes each in the file."""
    count = 100_000
    (tmp_path / "d.bin").write_bytes(np.arange(count, dtype=np.int32).tobytes())
    parts = (np.ones(count, np.int32), 4 * np.arange(count), np.arange(count + 1))
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, count, count + 1)
    (tmp_path / "d.idx").write_bytes(head + b"".join(part.tobytes() for part in parts))
    tracemalloc.start()
    try:
        first = [ids.tolist() for ids in itertools.islice(documents(tmp_path / "d.idx", "d.idx"), 3)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert first == [[0], [1], [2]]
    assert peak < 2**20


def test_a_folder_gives_its_tables_and_names_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clone of a hub repository, as it lies on the disk."""
    clone = tmp_path / "clone"
    pq_rows = [{"text": "one"}, {"text": "two"}]
    names = ["README.md", "LICENSE.txt", "notes.txt", "dataset_infos.json", ".gitattributes", "rows.jsonl.lz4"]
    for name in [*names, ".ipynb_checkpoints/a-checkpoint.jsonl", "data/LICENSE"]:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text('{"text": "not data"}\n')
    pq.write_table(pa.Table.from_pylist(pq_rows), clone / "data" / "train.parquet")
    _, rows = fetch(tmp_path / "out", source=str(clone))
    assert [r["text"] for r in rows] == ["one", "two"]
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    left_out = "LICENSE.txt, README.md, data/LICENSE, notes.txt, rows.jsonl.lz4"
    assert f"{clone}: 5 files of the directory are not read as data: {left_out} (" in warning


def test_a_folder_of_texts_is_read_but_for_what_is_about_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("README.md", "poem.txt", "song.md", "licences.txt"):
        (tmp_path / "texts" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text(name + "\n")
    _, rows = fetch(tmp_path / "out", source=str(tmp_path / "texts"))
    assert [r["text"] for r in rows] == ["poem.txt", "song.md"]
    assert "2 files of the directory are not read as data: README.md, licences.txt" in capsys.readouterr().err


def test_a_folder_of_every_compression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = {"": bytes, ".bz2": bz2.compress, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
    (tmp_path / "d").mkdir()
    for ending, compress in packed.items():
        line = json.dumps({"text": f"of {ending}"}) + "\n"
        (tmp_path / "d" / f"a.jsonl{ending}").write_bytes(compress(line.encode()))
    _, rows = fetch(tmp_path / "out", source=str(tmp_path / "d"))
    assert [r["text"] for r in rows] == [f"of {ending}" for ending in packed]
    assert "WARNING" not in capsys.readouterr().err


def test_a_changed_bin_file_is_noticed(tmp_path: Path) -> None:
    for name in ("megatron.bin", "megatron.idx"):
        shutil.copy(EXAMPLES / name, tmp_path)
    source = str(tmp_path / "megatron.idx")
    before = fetch(tmp_path / "out", source=source)[0]["sources"][0]
    content = bytearray((tmp_path / "megatron.bin").read_bytes())
    content[0] += 1
    (tmp_path / "megatron.bin").write_bytes(content)
    after, rows = fetch(tmp_path / "out", source=source)
    assert after["sources"][0]["moved_from"] == before["sha256"]
    assert rows[0]["input_ids"][0] == 6
    assert rows[0]["origin"] == f"{source}:1"
