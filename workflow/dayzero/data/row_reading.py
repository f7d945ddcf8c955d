"""The rows of a run's sources: read, normalised, and written as they come, with what must be known of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from dayzero.config import Data
from dayzero.console import ProgressBar, log
from dayzero.data import function_calling, hub_data, splits
from dayzero.data.file_kinds import data_files
from dayzero.data.formats import FORMATS, SCHEMAS, detect_format, normalise, stored_kind
from dayzero.data.readers import read_rows
from dayzero.data.rejects import Rejects
from dayzero.data.rows import Dropped, Example, Row
from dayzero.data.sources import fetch_files
from dayzero.data.spill import Spill
from dayzero.data.split_files import ReadRows, RowGroups, note_id
from dayzero.data.store_entry import Memory
from dayzero.data.stored_table import BATCH_BYTES, BATCH_ROWS
from dayzero.errors import ConfigError, DataError
from dayzero.format_columns import check_columns
from dayzero.source import listed, parse_source

REPEATABLE = ("text", "pretokenized")
"""Kinds of rows of which the same one may well come twice, like a line of a text."""


class RowReader:
    """Reads the sources of `data`, which `check_rows` has nothing against, into Parquet files of `workspace`.

    Rows that break their format are set aside in `folder` where `data.on_bad_row` asks for it.
    """

    def __init__(self, data: Data, folder: Path, workspace: Path, memory: Memory) -> None:
        self.data, self._workspace, self._memory = data, workspace, memory
        self._format: str = "template" if data.template else data.format
        self.kind = "" if self._format == "auto" else stored_kind(self._format, data.template)
        """The kind of row that all become, a key of SCHEMAS; known with the first row."""
        self.found: dict[str, None] = {}
        """The formats of the sources, in their order."""
        self.sources: list[dict[str, Any]] = []
        """What the manifest says of each source."""
        self.dropped: Counter[str] = Counter()
        """Rows left out, by reason."""
        self.rejects = Rejects(folder / "rejected.jsonl") if data.on_bad_row == "reject" else None
        self.num_rows = 0
        """Rows read and normalised so far."""
        # Of every row, on disk: its question's place, its content and its id.
        self.questions, self.contents, self.ids = (Spill(workspace / f"{n}.spill", 3) for n in ("q", "c", "i"))
        self._answers: dict[str, list[Any]] = {}

    def read_all(self) -> list[ReadRows]:
        """The rows to train on, then those of a validation and of a test source: a part for each of SPLITS.

        Raises ConfigError or DataError for what cannot be fetched or read, and for a source of which nothing is left.
        """
        answers = [self._read(text, "data.answers", None) for text in listed(self.data.answers)]
        self._answers = function_calling.read_answers(chain.from_iterable(answers))
        keys = ("source", "validation_source", "test_source")
        return [
            self._normalise(f"data.{key}", listed(getattr(self.data, key)), split)
            for key, split in zip(keys, splits.SPLITS, strict=True)
        ]

    def _normalise(self, key: str, sources: list[str], split: str) -> ReadRows:
        """Read and normalise the sources into one Parquet file of the workspace, a batch at a time."""
        rows = ReadRows(self._workspace / f"{split}.parquet", key, sources, self.num_rows, [0] * len(sources))
        if not sources:
            return rows
        limit = self.data.max_rows if split == "train" else None
        with ProgressBar(f"reading {split} rows", limit) as bar:
            self._write_batches(rows, self._all_examples(rows, split, limit, bar))
        return rows

    def _all_examples(
        self, rows: ReadRows, split: str, limit: int | None, bar: ProgressBar
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows to write of all sources, each with its size.

        The sources share `limit` evenly, and what one of them does not have goes to those after it.
        """
        hub_split = self.data.split if split == "train" else split
        left, cut = limit, []
        for number, text in enumerate(rows.sources):
            share = None if left is None else -(-left // (len(rows.sources) - number))
            before, dropped = self._num_rejected, Counter[str]()
            if self.rejects:
                self.rejects.first = ""
            rows.ends[number] = self.num_rows - rows.first
            for example in self._examples(self._read(text, rows.key, hub_split, share), dropped, bar):
                rows.ends[number] = self.num_rows - rows.first
                yield example
            if left is not None and share is not None:
                left -= self.sources[-1]["rows"]
                cut += [text] if self.sources[-1]["rows"] == share else []
            self.dropped.update(dropped)
            if rows.ends[number] == (rows.ends[number - 1] if number else 0):
                raise self._nothing_left(rows, text, dropped, self._num_rejected - before)
        if left and cut:
            log.warning(
                "WARNING: data.max_rows: %d rows of %s are read: other sources have fewer than their share of it, and "
                "there may be more in %s (name the smallest sources first, and the others get what they lack)",
                (limit or 0) - left, limit, ", ".join(cut),
            )  # fmt: skip

    def _nothing_left(self, rows: ReadRows, text: str, dropped: Counter[str], bad: int) -> DataError:
        """The error for a source of whose rows some were `dropped` and the others, `bad` ones, set aside."""
        remedy = ": remove it" if len(rows.sources) > 1 else ""
        if not bad or not self.rejects:
            return DataError(f"{rows.key}: {text}: no rows are left after leaving out {counts(dropped)}{remedy}")
        others = f" and {counts(dropped)} left out" if dropped else ""
        every = "" if dropped or bad == 1 else "all "
        return DataError(
            f"{rows.key}: {text}: {every}{bad} {'row is' if bad == 1 else 'rows are'} set aside{others}, so none "
            f"is left{remedy}; the first is {self.rejects.first}"
        )

    def _read(self, text: str, key: str, split: str | None, limit: int | None = None) -> Iterator[tuple[str, Row]]:
        """The rows of a source, at most `limit`: (origin, row). No bad one is set aside where `split` is None."""
        reject = self.rejects.add if self.rejects and split is not None else None
        source = parse_source(text, key)
        rows: Iterable[tuple[str, Row]]
        if source.kind == "hf":
            assert split is not None, "answers are files"
            # a limit alone asks for no more than it needs, too
            streaming = self.data.streaming or self.data.max_rows is not None
            fetched, rows = hub_data.load(source, key, self.data.subset, split, self._memory, streaming)
        else:
            pin = self.data.sha256.get(text) if isinstance(self.data.sha256, dict) else self.data.sha256
            fetched = fetch_files(source, key, self._workspace, self._memory, pin)
            files = data_files(fetched.path, fetched.label)
            rows = chain.from_iterable(read_rows(*file, reject) if reject else read_rows(*file) for file in files)
        record = {**fetched.record(), "rows": 0}
        self.sources.append(record)
        bad = self._num_rejected
        for count, (origin, row) in enumerate(islice(rows, limit), 1):
            record["rows"] = count
            yield origin, row
        if not record["rows"] and bad == self._num_rejected:
            raise DataError(f"{key}: {text} holds no rows: leave it out, or fetch it again")

    @property
    def _num_rejected(self) -> int:
        return self.rejects.count if self.rejects else 0

    def _examples(
        self, stream: Iterable[tuple[str, Row]], dropped: Counter[str], bar: ProgressBar
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows to write of a source, each with its size; what must be known of all of them is noted."""
        source_format: str | None = None
        unfit: ConfigError | None = None  # what the first row said that has no format
        for origin, row in stream:
            bar.advance()
            try:
                source_format = source_format or self._source_format(row, origin)
                example = self._example(row, origin, source_format)
            except ConfigError as error:
                if self.rejects is None or self._format != "auto":
                    raise
                unfit = unfit or error
                self._set_aside(origin, str(error).removeprefix("data.format auto: ").removeprefix(f"{origin} "), row)
                continue
            except DataError as error:
                if self.rejects is None:
                    raise
                self._set_aside(origin, str(error).removeprefix(f"{origin}: "), row)
                continue
            if isinstance(example, Example) and example.num_chars > (self.data.max_chars or example.num_chars):
                example = Dropped("too_long")
            if isinstance(example, Dropped):
                dropped[example.reason] += 1
                continue
            if self.kind not in REPEATABLE:
                self.contents.add(splits.exact_key(example.columns), self.num_rows)
            self.questions.add(splits.question_place(example.question, self.data.split_seed), self.num_rows)
            name = example.id or origin
            note_id(self.ids, name, self.num_rows)
            self.num_rows += 1
            yield example.num_chars, {"id": name, "origin": origin, **example.columns}
        if unfit and source_format is None:
            raise unfit  # not a bad row but a format that is not known

    def _set_aside(self, origin: str, reason: str, row: Row) -> None:
        assert self.rejects is not None
        try:
            self.rejects.add(origin, reason, row)
        except RecursionError:
            self.rejects.add(origin, reason, "nested too deeply to be written here")

    def _source_format(self, row: Row, origin: str) -> str:
        """The format of a source, by its first row where it is not configured."""
        name = detect_format(row, self.data.columns, origin) if self._format == "auto" else self._format
        kind = stored_kind(name, self.data.template)
        if self.kind and kind != self.kind:
            raise ConfigError(
                f"data.format auto: {origin} is of format {name}, kept as {kind}, but rows before it are kept as "
                f"{self.kind}: sources of one data set must become one kind; make them alike with data.template"
            )
        if name in FORMATS:
            check_columns(name, self.data.columns)
        if kind == "pretokenized" and self.data.max_chars:
            raise ConfigError("data.max_chars counts characters, and pretokenized rows have none: remove it")
        self.kind = kind
        self.found[name] = None
        self.sources[-1]["format"] = name
        return name

    def _example(self, row: Row, origin: str, source_format: str) -> Example | Dropped:
        try:
            if source_format == "function_calling":
                return function_calling.normalise_call(row, origin, self._answers)
            return normalise(row, origin, source_format, self.data.columns, self.data.template)
        except RecursionError as error:
            raise DataError(f"{origin}: the row is nested too deeply") from error

    def _schema(self) -> pa.Schema:
        schema = function_calling.SCHEMA if self._format == "function_calling" else SCHEMAS[self.kind]
        return pa.schema([("id", pa.string()), ("origin", pa.string()), *schema])

    def _write_batches(self, rows: ReadRows, examples: Iterator[tuple[int, dict[str, Any]]]) -> None:
        with ExitStack() as stack:
            out: RowGroups | None = None  # the format is known with the first row
            for batch in _batches(examples):
                out = out or stack.enter_context(RowGroups(rows.file, self._schema()))
                out.append(pa.RecordBatch.from_pylist(batch, schema=self._schema()))


def _batches(examples: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
    """Rows in lists of BATCH_ROWS, or fewer where they are large."""
    batch: list[dict[str, Any]] = []
    held = 0
    for size, row in examples:
        batch.append(row)
        held += size
        if len(batch) == BATCH_ROWS or held > BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def counts(found: Counter[str]) -> str:
    """Numbers by reason, in words."""
    return ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in found.items())
