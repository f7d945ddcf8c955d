"""Megatron's indexed data sets: NAME.bin holds token ids end to end, NAME.idx says where sequences and documents lie.

The index (https://github.com/NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py), little-endian: the magic,
uint64 version 1, uint8 code of the ids' type, uint64 S sequences, uint64 D + 1, then int32 [S] tokens of each sequence,
int64 [S] its first byte in the .bin file, and int64 [D + 1] the first sequence of each document.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dayzero.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""By code, the integer types among those of the format (6 and 7 are floats)."""

BLOCK = 2**12
"""Entries of the index that are in memory at once."""


def documents(index: Path, label: str) -> Iterator[np.ndarray]:
    """The token ids of each document in order, copied out of a memory map one at a time.

    Raises DataError for an index that is none, or that points beyond the .bin file.
    """
    data = index.with_suffix(".bin")
    if not data.is_file():
        raise DataError(f"{label}: there is no {data.name} beside it: a Megatron data set is a .bin and an .idx file")
    dtype, lengths, pointers, bounds = _read_index(index, label)
    size = data.stat().st_size
    width = np.dtype(dtype).itemsize
    for at in range(0, len(lengths), BLOCK):
        counts, starts = lengths[at : at + BLOCK], pointers[at : at + BLOCK]
        if counts.min() < 0 or starts.min() < 0 or (starts + counts.astype(np.int64) * width).max() > size:
            raise DataError(f"{label}: it points beyond the {size} bytes of {data.name}: fetch both files again")
    blocks = [bounds[at : at + BLOCK + 1] for at in range(0, len(bounds), BLOCK)]
    if blocks and (bounds[0] != 0 or bounds[-1] != len(lengths) or any((np.diff(part) < 0).any() for part in blocks)):
        raise DataError(f"{label}: its documents do not cover its {len(lengths)} sequences: fetch both files again")
    tokens = np.memmap(data, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
    for block in blocks:
        for first, last in itertools.pairwise(block.tolist()):
            places = zip(pointers[first:last].tolist(), lengths[first:last].tolist(), strict=True)
            parts: list[np.ndarray] = [tokens[start : start + count * width].view(dtype) for start, count in places]
            yield np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


def _read_index(index: Path, label: str) -> tuple[type, np.ndarray, np.ndarray, np.ndarray]:
    """The ids' type, and the lengths, first bytes and documents of the sequences, in memory maps."""
    size = index.stat().st_size
    with open(index, "rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(MAGIC):
        raise DataError(f"{label}: no index of a Megatron data set: it does not begin with MMIDIDX")
    _, version, code, sequences, bounds = _HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise DataError(f"{label}: version {version} with ids of type {code}; version 1 with integers is read")
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    if size < expected:
        raise DataError(f"{label}: {size} bytes, expected {expected}: the file is cut off, fetch it again")
    content = np.memmap(index, np.uint8, "r")
    at = _HEADER.size
    lengths = np.frombuffer(content, np.int32, sequences, at)
    pointers = np.frombuffer(content, np.int64, sequences, at + 4 * sequences)
    return DTYPES[code], lengths, pointers, np.frombuffer(content, np.int64, bounds, at + 12 * sequences)
