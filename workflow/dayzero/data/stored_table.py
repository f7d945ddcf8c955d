"""Opening the Parquet files of the store, so that reading one takes the memory of a row group, not of the file."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dayzero.errors import DataError


def open_table(file: Path) -> pq.ParquetFile:
    """A Parquet file to read in batches; raises DataError where it cannot be read.

    Neither buffered ahead nor mapped: all that was read would stay in memory.
    """
    try:
        return pq.ParquetFile(file, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {file} ({error}): fetch the data again") from error


def table_bytes(file: pq.ParquetFile) -> int:
    """Size of its rows in memory."""
    return sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
