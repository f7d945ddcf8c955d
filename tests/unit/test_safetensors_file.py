"""Headers of safetensors files: every dtype that the library writes, and files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dayzero.data.weights import tensor_dtypes
from dayzero.errors import DataError
from dayzero.safetensors_file import DTYPES, NewFile, read_header
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_is_counted_and_read(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "model.safetensors"
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).float().to(dtype)
    NewFile(file, {"a": tensor.to("meta")}).write("a", tensor)
    assert tensor_dtypes(file) == {dtype: 6}
    (stored,) = read_header(file)
    assert torch.equal(stored.read().view(torch.uint8), tensor.view(torch.uint8))
    if dtype != torch.float8_e8m0fnu:  # which the library does not know yet
        assert torch.equal(load_file(file)["a"].view(torch.uint8), tensor.view(torch.uint8))


def _header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged or cut-off weights"),
        (b"\xff" * 8 + b"{}", "its header is to end at byte"),
        (_header(b"{"), "damaged or cut-off weights"),
        (_header(b"[]"), "damaged or cut-off weights"),
        (_header(b'{"a": {"dtype": "F32"}}'), "damaged or cut-off weights"),
        (_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'), "its tensors are to end at byte"),
        (_header(b'{"a": {"dtype": "F5", "shape": [2], "data_offsets": [0, 0]}}'), "a is stored as F5, which is no"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"model.safetensors: .*{said}"):
        list(read_header(file))


def test_what_the_library_writes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2, 3), "n": torch.ones(4, dtype=torch.uint16), "s": torch.tensor(1.0)}, file)
    assert tensor_dtypes(file) == {torch.float32: 7, torch.uint16: 4}
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="cut-off"):
        tensor_dtypes(file)
    save_file({}, file, metadata={"format": "pt"})
    assert tensor_dtypes(file) == {}
    assert json.loads(file.read_bytes()[8:]) == {"__metadata__": {"format": "pt"}}
