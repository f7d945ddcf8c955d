"""Reading and writing parts of safetensors files: https://github.com/huggingface/safetensors#format

The library maps files into memory: what was read then stays in the process's resident memory until the file is closed,
and its other reader reads whole tensors. Here a rank reads just its rows, a block at a time, into memory of its own. To
write, the library wants all of a file's tensors at once; here they come one by one, in any order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dayzero.errors import DataError

INDEX = "model.safetensors.index.json"
BLOCK = 1 << 25
"""Bytes read at a time, 32 MiB: large enough for any disk, small beside a shard."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: where its bytes are, and what they mean."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    def meta(self) -> Tensor:
        """A tensor of this shape and dtype without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` (default: all) of dim 0 on the CPU; a tensor without dims is whole."""
        rows = self.shape[0] if self.shape else 1
        stop = rows if stop is None else stop
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        view = memoryview(data.numpy())  # type: ignore[arg-type]
        with open(self.file, "rb", buffering=0) as file:
            done = 0
            while done < len(view):
                read = os.preadv(file.fileno(), [view[done : done + BLOCK]], self.offset + start * row_bytes + done)
                if read == 0:
                    raise DataError(f"{self.file}: ends within {self.name}: fetch the model again")
                done += read
        return data.view(self.dtype).view(stop - start, *self.shape[1:]) if self.shape else data.view(self.dtype)[0]

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of pieces of about `BLOCK` bytes between the rows `start` and `stop`."""
        step = max(1, BLOCK // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        for first in range(start, stop, step):
            yield first, self.read(first, min(first + step, stop))


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a Hugging Face directory by its stored name, from the files' headers alone.

    Raises `DataError` where a file is missing or damaged.
    """
    files = [directory / "model.safetensors"]
    if (index := directory / INDEX).is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [directory / name for name in sorted(set(names))]
    return {tensor.name: tensor for file in files for tensor in read_header(file)}


class NewFile:
    """A safetensors file of given names, dtypes and shapes, as the library would write it; values come later."""

    def __init__(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the header for `tensors`, which are on the meta device."""
        self.file = file
        self.begins: dict[str, int] = {}
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # wide dtypes first, so that every tensor is aligned to its own
        for name in sorted(tensors, key=lambda n: (-_RANKS[_NAMES[tensors[n].dtype]], n)):
            tensor = tensors[name]
            begin, end = end, end + tensor.nbytes
            self.begins[name] = begin
            entries[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)
        self.start = 8 + len(header)
        with open(file, "wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(self.start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor on the CPU in its place."""
        view = memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        with open(self.file, "r+b", buffering=0) as stream:
            done = 0
            while done < len(view):
                place = self.start + self.begins[name] + done
                done += os.pwrite(stream.fileno(), view[done : done + BLOCK], place)


def read_header(file: Path) -> Iterator[StoredTensor]:
    """The tensors of one file. Raises `DataError` where it is missing, damaged or cut off."""
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = 8 + int.from_bytes(stream.read(8), "little")
            if start > size:
                raise ValueError(f"its header is to end at byte {start}, the file does at {size}")
            header = json.loads(stream.read(start - 8))
        header.pop("__metadata__", None)
        entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        if (end := start + max((entry[3] for entry in entries.values()), default=0)) != size:
            raise ValueError(f"its tensors are to end at byte {end}, the file does at {size}")
    except FileNotFoundError as error:
        raise DataError(f"{file} is missing: fetch the model again") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{file}: damaged or cut-off weights ({error}): fetch the model again") from error
    for name, (dtype, shape, begin, _) in entries.items():
        if dtype not in DTYPES:
            raise DataError(f"{file}: {name} is stored as {dtype}, which is no dtype of torch's: use other weights")
        yield StoredTensor(file, name, DTYPES[dtype], shape, start + begin)
