"""Rows of Parquet, Arrow and Megatron files, in memory of a batch at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dayzero.data import megatron
from dayzero.data.bad_rows import BadRow, Parsed
from dayzero.data.rows import PaddedRow, Row, check_names
from dayzero.data.stored_table import batch_rows, table_bytes
from dayzero.errors import short


def parquet_rows(path: Path, label: str) -> Parsed:
    """The rows of a Parquet file, row group by row group."""
    # buffering ahead would hold all of the file that was read
    with pq.ParquetFile(path, pre_buffer=False) as file:
        together = batch_rows(table_bytes(file), file.metadata.num_rows)
        yield from _rows(file.iter_batches(batch_size=together), label)


def arrow_rows(path: Path, label: str) -> Parsed:
    """An Arrow IPC file, or the bare stream that `datasets` writes."""
    with pa.memory_map(str(path)) as source:
        try:
            file = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            yield from _rows(pa.ipc.open_stream(source), label)
        else:
            yield from _rows((file.get_batch(i) for i in range(file.num_record_batches)), label)


def _rows(batches: Iterable[pa.RecordBatch], label: str) -> Parsed:
    number = 0
    for batch in batches:
        check_names(batch.schema.names, label)
        step = batch_rows(batch.nbytes, len(batch))
        for first in range(0, len(batch), step):
            for row in _python_rows(batch.slice(first, step)):
                number += 1
                yield f"{label}:{number}", row


def _python_rows(batch: pa.RecordBatch) -> Iterable[Row | BadRow]:
    """The rows of a batch; bad ones are those with a value that Python does not have, like text that is not UTF-8."""
    try:
        return [PaddedRow(row) for row in batch.to_pylist()]
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            return [BadRow(f"a value cannot be read ({short(error)})", None)]
        return itertools.chain.from_iterable(_python_rows(batch.slice(i, 1)) for i in range(len(batch)))


def megatron_rows(path: Path, label: str) -> Parsed:
    """The token ids of each document of a Megatron data set."""
    for number, ids in enumerate(megatron.documents(path, label), 1):
        yield f"{label}:{number}", {"input_ids": ids.tolist()}
