"""From sources to `store/data/{key}`: read, normalise, split, check, write Parquet and the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dayzero.config import Data
from dayzero.console import ProgressBar, log
from dayzero.data import function_calling, hub_data, splits
from dayzero.data.formats import SCHEMAS, Dropped, Example, check_columns, detect_format, normalise
from dayzero.data.readers import Row, data_files, read_rows
from dayzero.data.sources import Fetched, fetch_files, parse_source
from dayzero.data.store_entry import Memory, make_entry
from dayzero.errors import ConfigError, DataError
from dayzero.files import sha256_file
from dayzero.provenance import Clock

BATCH_ROWS = 1000


def fetch_data(data: Data, output: Path, clock: Clock) -> dict[str, Any]:
    """Make the data folder `output` and return its manifest.

    Raises ConfigError or DataError, and then leaves nothing.
    """
    _check(data)
    spec = {"data": data.model_dump(mode="json")}
    return make_entry(output, spec, lambda *places: _Maker(data, *places).make(clock))


def _check(data: Data) -> None:
    sources = _all_sources(data)
    if not data.source:
        raise ConfigError("data.source is not set: give `hf:org/name@revision`, a file or `package:NAME==VERSION/path`")
    if data.format == "function_calling" and not data.answers:
        raise ConfigError("data.answers is not set: format function_calling needs the files with the accepted answers")
    if data.answers and data.format not in ("function_calling", "auto"):
        raise ConfigError(f"data.answers is only read by format function_calling, not by {data.format}: remove one")
    if data.subset and not any(s.startswith("hf:") for s in sources):
        raise ConfigError(f"data.subset {data.subset!r} is only for `hf:` sources: remove it")
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


@dataclass
class _Rows:
    """Normalised rows on disk (in `file`, in reading order) and each row's question key in memory."""

    file: Path
    keys: list[bytes] = field(default_factory=list)


class _Maker:
    def __init__(self, data: Data, folder: Path, workspace: Path, memory: Memory) -> None:
        self.data, self.folder, self.workspace, self.memory = data, folder, workspace, memory
        self.format: str = "function_calling" if data.answers else data.format
        self.dropped: Counter[str] = Counter()
        self.sources: list[dict[str, Any]] = []
        self.ids: set[str] = set()
        self.answers: dict[str, list[Any]] = {}

    def make(self, clock: Clock) -> dict[str, Any]:
        """Fill the folder; returns the manifest."""
        if self.data.answers:
            if self.data.columns:
                raise ConfigError("data.columns is not read by format function_calling: remove it")
            self.answers = function_calling.read_answers(self._read(_listed(self.data.answers), "data.answers", None))
        main = self._normalise(_listed(self.data.source), "data.source", "train", self.data.max_rows)
        validation = self._normalise(_listed(self.data.validation_source), "data.validation_source", "validation")
        test = self._normalise(_listed(self.data.test_source), "data.test_source", "test")
        if self.dropped:
            log.info("left out: %s", _counts(self.dropped))

        total = len(main.keys)
        cut_validation = 0 if self.data.validation_source else self._size("validation_size", total)
        cut_test = 0 if self.data.test_source else self._size("test_size", total)
        split = splits.assign_splits(main.keys, cut_validation, cut_test, self.data.split_seed)
        parts = {
            "train": (main, split == splits.TRAIN),
            "validation": (main, split == splits.VALIDATION) if cut_validation else (validation, _all(validation)),
            "test": (main, split == splits.TEST) if cut_test else (test, _all(test)),
        }
        parts = self._keep_apart(parts)
        written = {name: self._write(name, *part) for name, part in parts.items() if part[1].any()}
        if "train" not in written:
            raise DataError("data.source: no training row is left: all share a question with validation or test")
        wanted = {
            "test": cut_test or self.data.test_source,
            "validation": cut_validation or self.data.validation_source,
        }
        for name, needed in wanted.items():
            if needed and name not in written:
                raise ConfigError(f"data.{name}_size: no {name} row could be cut without sharing a question: raise it")
        log.info("rows: %s", ", ".join(f"{name} {s['rows']}" for name, s in written.items()))
        questions = {name: _questions(*part) for name, part in parts.items()}
        return {
            "format": "messages" if self.format == "function_calling" else self.format,
            "source_format": self.format,
            "splits": written,
            "sources": self.sources,
            "dropped": dict(self.dropped),
            "overlap": {
                "test_train_questions": splits.overlap(questions["test"], questions["train"]),
                "test_validation_questions": splits.overlap(questions["test"], questions["validation"]),
                "validation_train_questions": splits.overlap(questions["validation"], questions["train"]),
                "method": f"equal questions after: {splits.NORMALISATION}",
            },
            "provenance": clock.provenance(split_seed=self.data.split_seed),
        }

    def _size(self, name: str, total: int) -> int:
        return splits.num_rows(getattr(self.data, name), total, f"data.{name}")

    def _keep_apart(self, parts: dict[str, tuple[_Rows, np.ndarray]]) -> dict[str, tuple[_Rows, np.ndarray]]:
        """Drop validation and training rows that share a question with test, and training rows with validation."""
        taken: set[bytes] = set()
        result = {}
        for name in ("test", "validation", "train"):
            rows, chosen = parts[name]
            keep = chosen & np.array([key not in taken for key in rows.keys], dtype=bool)
            if lost := int(chosen.sum() - keep.sum()):
                self.dropped[f"{name}_question_held_out"] += lost
                log.warning("WARNING: %d %s rows share a question with held-out rows and are left out", lost, name)
            result[name] = (rows, keep)
            taken |= _questions(rows, keep)
        return {name: result[name] for name in ("train", "validation", "test")}

    def _read(self, texts: list[str], key: str, split: str | None) -> Iterator[tuple[str, Row]]:
        for text in texts:
            source = parse_source(text, key)
            count = 0
            rows: Iterable[tuple[str, Row]]
            if source.kind == "hf" and split is not None:
                fetched, rows = hub_data.load(source, key, self.data.subset, split, self.memory)
                self._check_hub_pin(fetched)
            elif source.kind == "hf":
                raise ConfigError(f"{key}: {text!r}: answers are read from files: give a local path or a package")
            else:
                pin = self.data.sha256.get(text) if isinstance(self.data.sha256, dict) else self.data.sha256
                fetched = fetch_files(source, key, self.workspace, self.memory, pin)
                rows = (row for file in data_files(fetched.path, fetched.label) for row in read_rows(*file))
            record = {**fetched.record(), "rows": 0}
            self.sources.append(record)
            for count, row in enumerate(rows, 1):
                record["rows"] = count
                yield row
            if not count:
                raise DataError(f"{key}: {text} holds no rows")

    def _check_hub_pin(self, fetched: Fetched) -> None:
        text = fetched.source.text
        if self.data.sha256 and (isinstance(self.data.sha256, str) or text in self.data.sha256):
            raise ConfigError(f"data.sha256: {text} is a hub data set: pin its commit instead, `hf:org/name@commit`")

    def _normalise(self, texts: list[str], key: str, split: str, limit: int | None = None) -> _Rows:
        """Read and normalise the sources into one Parquet file of the workspace, a batch at a time."""
        rows = _Rows(self.workspace / f"{split}.parquet")
        if not texts:
            return rows
        dropped: Counter[str] = Counter()
        hub_split = self.data.split if split == "train" else split
        with ProgressBar(f"reading {split} rows", limit) as bar:
            stream = islice(self._read(texts, key, hub_split), limit)
            self._write_batches(rows, self._examples(stream, rows, dropped, bar))
        self.dropped.update(dropped)
        if not rows.keys:
            raise DataError(f"{key}: no rows are left after leaving out {_counts(dropped) or 'nothing'}")
        return rows

    def _examples(
        self, stream: Iterable[tuple[str, Row]], rows: _Rows, dropped: Counter[str], bar: ProgressBar
    ) -> Iterator[dict[str, Any]]:
        seen: set[bytes] = set()
        for number, (origin, row) in enumerate(stream):
            bar.advance()
            if self.format == "auto":
                self.format = detect_format(row, self.data.columns, origin)
            if number == 0 and self.format != "function_calling":
                check_columns(self.format, self.data.columns)
            example = self._example(row, origin)
            if isinstance(example, Example) and example.num_chars > (self.data.max_chars or example.num_chars):
                example = Dropped("too_long")
            if isinstance(example, Dropped):
                dropped[example.reason] += 1
                continue
            if self.format != "text":  # a line of a text may well come twice
                content = splits.exact_key(example.columns)
                if content in seen:
                    dropped["duplicate"] += 1
                    continue
                seen.add(content)
            rows.keys.append(splits.question_key(example.question))
            yield {"id": self._id(example.id, origin), "origin": origin, **example.columns}

    def _example(self, row: Row, origin: str) -> Example | Dropped:
        if self.format == "function_calling":
            return function_calling.normalise_call(row, origin, self.answers)
        return normalise(row, origin, self.format, self.data.columns)

    def _id(self, wanted: str | None, origin: str) -> str:
        """The row's own id, or its origin; made unique by a number where it is not."""
        base = name = wanted or origin
        number = 1
        while name in self.ids:
            number += 1
            name = f"{base}#{number}"
        self.ids.add(name)
        return name

    def _schema(self) -> pa.Schema:
        schema = function_calling.SCHEMA if self.format == "function_calling" else SCHEMAS[self.format]
        return pa.schema([("id", pa.string()), ("origin", pa.string()), *schema])

    def _write_batches(self, rows: _Rows, examples: Iterator[dict[str, Any]]) -> None:
        batch = list(islice(examples, BATCH_ROWS))
        if not batch:
            return
        schema = self._schema()
        with pq.ParquetWriter(rows.file, schema, compression="zstd") as writer:
            while batch:
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                batch = list(islice(examples, BATCH_ROWS))

    def _write(self, name: str, rows: _Rows, chosen: np.ndarray) -> dict[str, Any]:
        file = self.folder / f"{name}.parquet"
        start = 0
        with (
            pq.ParquetFile(rows.file) as source,
            pq.ParquetWriter(file, source.schema_arrow, compression="zstd") as out,
        ):
            for batch in source.iter_batches(batch_size=BATCH_ROWS):
                picked = batch.filter(pa.array(chosen[start : start + len(batch)]))
                start += len(batch)
                if len(picked):
                    out.write_batch(picked)
        questions = len(_questions(rows, chosen))
        return {"file": file.name, "rows": int(chosen.sum()), "questions": questions, "sha256": sha256_file(file)}


def _all(rows: _Rows) -> np.ndarray:
    return np.ones(len(rows.keys), dtype=bool)


def _questions(rows: _Rows, chosen: np.ndarray) -> set[bytes]:
    return {rows.keys[i] for i in np.flatnonzero(chosen)}


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in counts.items())
