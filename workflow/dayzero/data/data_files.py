"""From sources to `store/data/{key}`: read, normalise, split, check, write Parquet and the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dayzero.column_template import check_templates, parse_template
from dayzero.config import Data
from dayzero.console import ProgressBar, log
from dayzero.data import function_calling, hub_data, splits
from dayzero.data.formats import FORMATS, SCHEMAS, check_columns, detect_format, normalise, stored_kind
from dayzero.data.readers import BATCH_BYTES, BATCH_ROWS, data_files, read_rows
from dayzero.data.rejects import Rejects
from dayzero.data.rows import Dropped, Example, Row
from dayzero.data.sources import Fetched, fetch_files, parse_source
from dayzero.data.spill import Spill, row_array
from dayzero.data.split_files import ReadRows, RowGroups, leave_out_copies, note_id, number_ids, write_splits
from dayzero.data.store_entry import Memory, make_entry
from dayzero.errors import ConfigError, DataError
from dayzero.provenance import Clock
from dayzero.store import data_section

SOURCES = ("data.source", "data.validation_source", "data.test_source")
"""Keys that name the rows of the splits, in their order."""
REPEATABLE = ("text", "pretokenized")
"""Kinds of rows of which the same one may well come twice, like a line of a text."""


def fetch_data(data: Data, output: Path, clock: Clock) -> dict[str, Any]:
    """Make the data folder `output` and return its manifest.

    Raises ConfigError or DataError, and then leaves nothing.
    """
    _check(data)
    spec = {"data": data_section(data)}
    return make_entry(output, spec, lambda *places: _Maker(data, *places).make(clock))


def _check(data: Data) -> None:
    sources = _all_sources(data)
    if not data.source:
        raise ConfigError("data.source is not set: give `hf:org/name@revision`, a file or `package:NAME==VERSION/path`")
    if data.format == "function_calling" and not data.answers:
        raise ConfigError("data.answers is not set: format function_calling needs the files with the accepted answers")
    if data.answers and data.format not in ("function_calling", "auto"):
        raise ConfigError(f"data.answers is only read by format function_calling, not by {data.format}: remove one")
    if (data.template is not None) != (data.format == "template") and data.format != "auto":
        raise ConfigError(f"data.template goes with data.format template (or auto), not with {data.format}")
    if data.template is not None:
        check_templates(data.template)
    if data.subset and not any(s.startswith("hf:") for s in sources):
        raise ConfigError(f"data.subset {data.subset!r} is only for `hf:` sources: remove it")
    if data.max_rows is not None and data.max_rows < len(_listed(data.source)):
        raise ConfigError(
            f"data.max_rows: {data.max_rows} rows for {len(_listed(data.source))} sources, which share them evenly: "
            "give at least one row for each, or name fewer sources"
        )
    if isinstance(data.sha256, str) and len(sources) > 1:
        raise ConfigError(
            "data.sha256: there are several sources: give a mapping from each source's text to its sha256"
        )
    for name in data.sha256 if isinstance(data.sha256, dict) else ():
        if name not in sources:
            raise ConfigError(f"data.sha256: {name!r} is not one of the sources: use a source's exact text")


def _all_sources(data: Data) -> list[str]:
    groups = (data.source, data.validation_source, data.test_source, data.answers)
    return [text for group in groups for text in _listed(group)]


def _listed(group: str | list[str] | None) -> list[str]:
    return [group] if isinstance(group, str) else list(group or [])


class _Maker:
    def __init__(self, data: Data, folder: Path, workspace: Path, memory: Memory) -> None:
        self.data, self.folder, self.workspace, self.memory = data, folder, workspace, memory
        self.format: str = "function_calling" if data.answers else "template" if data.template else data.format
        self.kind = "" if self.format == "auto" else stored_kind(self.format, data.template)
        self.found: dict[str, None] = {}  # the formats of the sources, in their order
        self.rejects = Rejects(folder / "rejected.jsonl") if data.on_bad_row == "reject" else None
        self.dropped: Counter[str] = Counter()
        self.sources: list[dict[str, Any]] = []
        self.num_rows = 0  # read and normalised so far
        # Of every row, on disk: its question's place, its content and its id.
        self.questions, self.contents, self.ids = (Spill(workspace / f"{n}.spill", 3) for n in ("q", "c", "i"))
        self.answers: dict[str, list[Any]] = {}

    def make(self, clock: Clock) -> dict[str, Any]:
        """Fill the folder; returns the manifest."""
        if self.data.answers:
            if self.data.columns:
                raise ConfigError("data.columns is not read by format function_calling: remove it")
            texts = _listed(self.data.answers)
            answers = chain.from_iterable(self._read(text, "data.answers", None) for text in texts)
            self.answers = function_calling.read_answers(answers)
        elif self.format == "template":
            self._check_template_columns()
        named = {key: _listed(getattr(self.data, key.partition(".")[2])) for key in SOURCES}
        parts = [
            self._normalise(texts, key, name, self.data.max_rows if name == "train" else None)
            for (key, texts), name in zip(named.items(), splits.SPLITS, strict=True)
        ]
        split = row_array(self.workspace / "split", self.num_rows, np.int8)
        for part, number in zip(parts, (splits.TRAIN, splits.VALIDATION, splits.TEST), strict=True):
            split[part.rows] = number
        if copies := leave_out_copies(self.contents, split, parts):
            self.dropped["duplicate"] += copies
            for (key, texts), part in zip(named.items(), parts, strict=True):
                _check_copies(texts, key, part, split)
        if self.dropped:
            log.info("left out: %s", _counts(self.dropped))
        assigned = self._assign(split, parts[0])
        numbers = row_array(self.workspace / "numbers", self.num_rows, np.int32)
        number_ids(self.ids, split, numbers)
        written = write_splits(self.folder, parts, split, numbers)
        for name, entry in written.items():
            entry["questions"] = int(assigned.questions[splits.SPLITS.index(name)])
        self._check_written(written, assigned)
        self._name_unused(list(named.values()), written)
        log.info("rows: %s", ", ".join(f"{name} {s['rows']}" for name, s in written.items()))
        return {
            "format": self.kind,
            "source_format": ", ".join(self.found),
            "splits": written,
            "sources": self.sources,
            "dropped": dict(self.dropped),
            **({"rejected": self.rejects.close()} if self.rejects else {}),
            "overlap": {
                **{
                    f"{splits.SPLITS[a]}_{splits.SPLITS[b]}_questions": count
                    for (a, b), count in assigned.shared.items()
                },
                "method": f"equal questions after: {splits.NORMALISATION}",
            },
            "provenance": clock.provenance(split_seed=self.data.split_seed),
        }

    def _assign(self, split: np.ndarray, main: ReadRows) -> splits.Assigned:
        """Cut validation and test, and leave out rows that share a question with held-out ones."""
        total = sum(
            int((split[i : min(i + 2**20, main.num_rows)] == splits.TRAIN).sum())
            for i in range(0, main.num_rows, 2**20)
        )
        cut = {
            name: 0
            if getattr(self.data, f"{name}_source")
            else splits.num_rows(getattr(self.data, f"{name}_size"), total, f"data.{name}_size")
            for name in ("validation", "test")
        }
        assigned = splits.assign_splits(self.questions, split, main.num_rows, cut["validation"], cut["test"])
        for number in (splits.VALIDATION, splits.TRAIN):
            if lost := assigned.held_out[number]:
                name = splits.SPLITS[number]
                self.dropped[f"{name}_question_held_out"] += lost
                log.warning("WARNING: %d %s rows share a question with held-out rows and are left out", lost, name)
        return assigned

    def _check_written(self, written: dict[str, Any], assigned: splits.Assigned) -> None:
        if "train" not in written:
            raise DataError("data.source: no training row is left: all share a question with validation or test")
        for name in ("test", "validation"):
            if name in written:
                continue
            if getattr(self.data, f"{name}_source"):
                raise DataError(f"data.{name}_source: no {name} row is left: all share a question with test")
            if getattr(self.data, f"{name}_size"):
                raise splits.not_cut(name, assigned, written["train"]["rows"])

    def _name_unused(self, sources: list[list[str]], written: dict[str, Any]) -> None:
        """Warn of sources of whose rows none is in the split that they are for."""
        for name, texts in zip(splits.SPLITS, sources, strict=True):
            for number, text in enumerate(texts):
                if written[name]["source_rows"][number]:
                    continue
                cut = [
                    f"{count} cut for {other}"
                    for other in ("validation", "test")
                    if name == "train" and other in written and not getattr(self.data, f"{other}_source")
                    if (count := written[other]["source_rows"][number])
                ]
                log.warning(
                    "WARNING: no %s row of %s is left: %s",
                    name, text, ", ".join([*cut, "all others are copies or share a question with held-out rows"]),
                )  # fmt: skip

    def _read(self, text: str, key: str, split: str | None, limit: int | None = None) -> Iterator[tuple[str, Row]]:
        """The rows of a source, at most `limit`: (origin, row)."""
        reject = self.rejects.add if self.rejects and split is not None else None
        source = parse_source(text, key)
        rows: Iterable[tuple[str, Row]]
        if source.kind == "hf" and split is not None:
            # a limit alone asks for no more than it needs, too
            streaming = self.data.streaming or self.data.max_rows is not None
            fetched, rows = hub_data.load(source, key, self.data.subset, split, self.memory, streaming)
            self._check_hub_pin(fetched)
        elif source.kind == "hf":
            raise ConfigError(f"{key}: {text!r}: answers are read from files: give a local path or a package")
        else:
            pin = self.data.sha256.get(text) if isinstance(self.data.sha256, dict) else self.data.sha256
            fetched = fetch_files(source, key, self.workspace, self.memory, pin)
            files = data_files(fetched.path, fetched.label)
            rows = chain.from_iterable(read_rows(*file, reject) if reject else read_rows(*file) for file in files)
        record = {**fetched.record(), "rows": 0}
        self.sources.append(record)
        bad = self.rejects.count if self.rejects else 0
        for count, (origin, row) in enumerate(islice(rows, limit), 1):
            record["rows"] = count
            yield origin, row
        if not record["rows"] and bad == (self.rejects.count if self.rejects else 0):
            raise DataError(f"{key}: {text} holds no rows")

    def _check_hub_pin(self, fetched: Fetched) -> None:
        text = fetched.source.text
        if self.data.sha256 and (isinstance(self.data.sha256, str) or text in self.data.sha256):
            raise ConfigError(f"data.sha256: {text} is a hub data set: pin its commit instead, `hf:org/name@commit`")

    def _normalise(self, texts: list[str], key: str, split: str, limit: int | None = None) -> ReadRows:
        """Read and normalise the sources into one Parquet file of the workspace, a batch at a time.

        They share `limit` evenly, and what one of them does not have goes to those after it. Raises DataError for a
        source of which nothing is left.
        """
        rows = ReadRows(self.workspace / f"{split}.parquet", self.num_rows, [0] * len(texts))
        if not texts:
            return rows
        hub_split = self.data.split if split == "train" else split
        with ProgressBar(f"reading {split} rows", limit) as bar:
            self._write_batches(rows, self._all_examples(texts, key, hub_split, limit, rows, bar))
        return rows

    def _all_examples(
        self, texts: list[str], key: str, split: str, limit: int | None, rows: ReadRows, bar: ProgressBar
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows to write of all sources, each with its size."""
        left, cut = limit, []
        for number, text in enumerate(texts):
            share = None if left is None else -(-left // (len(texts) - number))
            before, dropped = self.rejects.count if self.rejects else 0, Counter[str]()
            rows.ends[number] = self.num_rows - rows.first
            for example in self._examples(self._read(text, key, split, share), dropped, bar):
                rows.ends[number] = self.num_rows - rows.first
                yield example
            if left is not None and share is not None:
                left -= self.sources[-1]["rows"]
                cut += [text] if self.sources[-1]["rows"] == share else []
            self.dropped.update(dropped)
            if rows.ends[number] == (rows.ends[number - 1] if number else 0):
                bad = self.rejects.count - before if self.rejects else 0
                raise DataError(
                    f"{key}: {text}: no rows are left after leaving out {_counts(dropped) or 'nothing'}"
                    f"{f' and {bad} rejected' if bad else ''}{': remove it' if len(texts) > 1 else ''}"
                )
        if left and cut:
            log.warning(
                "WARNING: data.max_rows: %d rows of %s are read: other sources have fewer than their share of it, and "
                "there may be more in %s (name the smallest sources first, and the others get what they lack)",
                (limit or 0) - left, limit, ", ".join(cut),
            )  # fmt: skip

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
                if self.rejects is None or self.format != "auto":
                    raise
                unfit = unfit or error
                self._set_aside(origin, str(error).removeprefix("data.format auto: "), row)
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
        name = detect_format(row, self.data.columns, origin) if self.format == "auto" else self.format
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

    def _check_template_columns(self) -> None:
        """Refuse renamed columns that the template does not name."""
        assert self.data.template is not None
        parts = [part for key, text in self.data.template.items() for part in parse_template(text, key)]
        known = ["id", *(name for _, name in parts if name is not None)]
        for name in self.data.columns:
            if name not in known:
                raise ConfigError(f"data.columns: {name!r} is not in data.template, which names {', '.join(known[1:])}")

    def _example(self, row: Row, origin: str, source_format: str) -> Example | Dropped:
        try:
            if source_format == "function_calling":
                return function_calling.normalise_call(row, origin, self.answers)
            return normalise(row, origin, source_format, self.data.columns, self.data.template)
        except RecursionError as error:
            raise DataError(f"{origin}: the row is nested too deeply") from error

    def _schema(self) -> pa.Schema:
        schema = function_calling.SCHEMA if self.format == "function_calling" else SCHEMAS[self.kind]
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


def _check_copies(texts: list[str], key: str, part: ReadRows, split: np.ndarray) -> None:
    """Refuse a source whose rows are all copies."""
    start = part.first
    for text, end in zip(texts, part.ends, strict=True):
        stop = part.first + end
        if all((split[i : min(i + 2**20, stop)] == splits.LEFT_OUT).all() for i in range(start, stop, 2**20)):
            raise DataError(
                f"{key}: no row of {text} is left: all {stop - start} are copies of rows of the sources before it: "
                "remove it"
            )
        start = stop


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in counts.items())
