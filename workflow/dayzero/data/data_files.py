"""From sources to `store/data/{key}`: read, normalise, split, check, write Parquet and the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dayzero.config import Data
from dayzero.config_checks.data import check_rows
from dayzero.console import log
from dayzero.data import splits
from dayzero.data.row_reading import RowReader, counts
from dayzero.data.spill import row_array
from dayzero.data.split_files import ReadRows, leave_out_copies, number_ids, write_splits
from dayzero.data.store_entry import Memory, make_entry
from dayzero.errors import ConfigError, DataError
from dayzero.provenance import Clock
from dayzero.store import data_section


def fetch_data(data: Data, output: Path, clock: Clock) -> dict[str, Any]:
    """Make the data folder `output` and return its manifest.

    Raises ConfigError or DataError, and then leaves nothing.
    """
    if found := next(check_rows(data), None):
        raise ConfigError(": ".join(found))

    def make(folder: Path, workspace: Path, memory: Memory) -> dict[str, Any]:
        manifest = make_splits(RowReader(data, folder, workspace, memory), folder, workspace)
        return {**manifest, "provenance": clock.provenance(split_seed=data.split_seed)}

    return make_entry(output, {"data": data_section(data)}, make)


def make_splits(reader: RowReader, folder: Path, workspace: Path) -> dict[str, Any]:
    """Read all rows, write the splits into `folder` and return what the manifest says of them.

    Raises ConfigError or DataError for rows that cannot be read or split as `reader.data` asks.
    """
    parts = reader.read_all()
    split = row_array(workspace / "split", reader.num_rows, np.int8)
    for part, number in zip(parts, (splits.TRAIN, splits.VALIDATION, splits.TEST), strict=True):
        split[part.rows] = number
    if copies := leave_out_copies(reader.contents, split, parts):
        reader.dropped["duplicate"] += copies
        for part in parts:
            _check_copies(part, split)
    if reader.dropped:
        log.info("left out: %s", counts(reader.dropped))
    assigned = _assign(reader, split, parts[0])
    numbers = row_array(workspace / "numbers", reader.num_rows, np.int32)
    number_ids(reader.ids, split, numbers)
    written = write_splits(folder, parts, split, numbers)
    for name, entry in written.items():
        entry["questions"] = int(assigned.questions[splits.SPLITS.index(name)])
    _check_written(reader.data, written, assigned)
    _name_unused(reader.data, parts, written)
    log.info("rows: %s", ", ".join(f"{name} {s['rows']}" for name, s in written.items()))
    return {
        "format": reader.kind,
        "source_format": ", ".join(reader.found),
        "splits": written,
        "sources": reader.sources,
        "dropped": dict(reader.dropped),
        **({"rejected": reader.rejects.close()} if reader.rejects else {}),
        "overlap": {
            **{f"{splits.SPLITS[a]}_{splits.SPLITS[b]}_questions": count for (a, b), count in assigned.shared.items()},
            "method": f"equal questions after: {splits.NORMALISATION}",
        },
    }


def _check_copies(part: ReadRows, split: NDArray[np.int8]) -> None:
    """Refuse a source whose rows are all copies."""
    start = part.first
    for text, end in zip(part.sources, part.ends, strict=True):
        stop = part.first + end
        if all((split[i : min(i + 2**20, stop)] == splits.LEFT_OUT).all() for i in range(start, stop, 2**20)):
            raise DataError(
                f"{part.key}: no row of {text} is left: all {stop - start} are copies of rows of the sources before "
                "it: remove it"
            )
        start = stop


def _assign(reader: RowReader, split: NDArray[np.int8], main: ReadRows) -> splits.Assigned:
    """Cut validation and test, and leave out rows that share a question with held-out ones."""
    data = reader.data
    total = sum(
        int((split[i : min(i + 2**20, main.num_rows)] == splits.TRAIN).sum()) for i in range(0, main.num_rows, 2**20)
    )
    validation, test = (
        0 if getattr(data, f"{name}_source") else splits.num_rows(getattr(data, f"{name}_size"), total)
        for name in ("validation", "test")
    )
    assigned = splits.assign_splits(reader.questions, split, main.num_rows, validation, test)
    for number in (splits.VALIDATION, splits.TRAIN):
        if lost := assigned.held_out[number]:
            name = splits.SPLITS[number]
            reader.dropped[f"{name}_question_held_out"] += lost
            log.warning("WARNING: %d %s rows share a question with held-out rows and are left out", lost, name)
    return assigned


def _check_written(data: Data, written: dict[str, Any], assigned: splits.Assigned) -> None:
    if "train" not in written:
        raise DataError(
            "data.source: no training row is left: all share a question with validation or test: add other rows"
        )
    for name in ("test", "validation"):
        if name in written:
            continue
        if getattr(data, f"{name}_source"):
            raise DataError(
                f"data.{name}_source: no {name} row is left: all share a question with test: name other rows"
            )
        if getattr(data, f"{name}_size"):
            raise splits.not_cut(name, assigned, written["train"]["rows"])


def _name_unused(data: Data, parts: list[ReadRows], written: dict[str, Any]) -> None:
    """Warn of sources of whose rows none is in the split that they are for."""
    for name, part in zip(splits.SPLITS, parts, strict=True):
        for number, text in enumerate(part.sources):
            if written[name]["source_rows"][number]:
                continue
            cut = [
                f"{count} cut for {other}"
                for other in ("validation", "test")
                if name == "train" and other in written and not getattr(data, f"{other}_source")
                if (count := written[other]["source_rows"][number])
            ]
            log.warning(
                "WARNING: no %s row of %s is left: %s",
                name, text, ", ".join([*cut, "all others are copies or share a question with held-out rows"]),
            )  # fmt: skip
