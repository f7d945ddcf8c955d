"""A split's Parquet file -> its token store, over processes, with memory that does not grow with the tokens.

The parent reads the file batch by batch, packs what the workers return, in order, a window at a time, and appends the
rows to the store: one pass. The result does not depend on the number of workers.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dayzero.config import Tokenize
from dayzero.config_checks import LOSS_KEYS
from dayzero.console import ProgressBar, log
from dayzero.data.documents import COLUMNS, OPTIONAL_COLUMNS, DocumentEncoder
from dayzero.data.histogram import LengthHistogram
from dayzero.data.mixing import by_source
from dayzero.data.packing import Documents, pack_stream
from dayzero.data.rejects import Rejects
from dayzero.data.stored_table import batch_rows, open_table, rows_of, table_bytes
from dayzero.data.tokenizer import TokenizerSource, check_model_limits
from dayzero.data.tokens import TokenWriter
from dayzero.errors import DataError

SMALLEST_TASK, LARGEST_TASK, TASKS, ROWS_PER_TASK = 2**17, 2**19, 64, 4096
"""Bytes of source rows that a worker is handed at a time, at least and at most; between them, so many tasks there are.
However short rows are, at most so many. It must not depend on the number of workers: where tasks end changes where
packing's windows do."""
BYTES_PER_WORKER = 2**20
"""Less text than this is not worth one more process that is a copy of this one."""
BYTES_PER_SERVED_WORKER = 32 * 2**20
"""Nor less than this one that must import first: transformers imports torch, which takes as long as some 10 MB."""
TASKS_AHEAD = 4
"""Tasks waiting for each worker; bounds the rows in memory."""

_Setup = tuple[TokenizerSource, str, Tokenize, bool]
"""What a worker is told: the tokenizer, the rows' format, how to encode them, and whether bad ones are set aside."""
_COUNTED = ("rows", "documents", "tokens")


@dataclass
class Encoded:
    """What became of some rows."""

    documents: Documents
    counts: Counter[str]
    source_rows: int
    rejected: list[tuple[str, str, Mapping[str, Any]]]


def tokenize_split(
    source: Path,
    output: Path,
    *,
    name: str,
    data_format: str,
    tokenizer: TokenizerSource,
    options: Tokenize,
    num_workers: int,
    sources: Sequence[tuple[str, int]] | None = None,
    reject: bool = False,
) -> dict[str, Any]:
    """Write the token store of one split to the new directory `output` and return what the manifest says about it.

    Args:
        source: the split's Parquet file.
        name: the split's name, for messages.
        data_format: text, prompt_completion, messages or pretokenized.
        num_workers: processes; the result does not depend on it.
        sources: name and rows of each source in the file, in its order: no row of tokens then holds two sources.
        reject: set rows that cannot be encoded aside, in rejected.jsonl of `output`.

    Raises DataError for a file that cannot be read, lacks a column, or leaves no supervised token, of one of `sources`
    too, and, unless told to `reject` it, for a row that cannot be encoded; ConfigError for a tokenizer that does not
    fit the format or the model.
    """
    check_model_limits(tokenizer.path, seq_len=options.seq_len)
    counts: Counter[str] = Counter()
    source_rows, label_tokens, max_token_id = 0, 0, -1
    lengths = LengthHistogram()
    rejects = Rejects(output / "rejected.jsonl")

    def documents() -> Iterator[Documents]:
        nonlocal counts, source_rows, label_tokens, max_token_id
        for part in _encode(source, name, num_workers, (tokenizer, data_format, options, reject)):
            for row in part.rejected:
                rejects.add(*row)
            counts += part.counts
            source_rows += part.source_rows
            label_tokens += int(part.documents.loss_mask.sum())
            max_token_id = max(max_token_id, int(part.documents.input_ids.max(initial=-1)))
            lengths.add(part.documents.lengths)
            if len(part.documents.lengths):
                yield part.documents

    rows_by_source = [count for _, count in sources or [("", 2**62)]]
    of_source = [dict.fromkeys(_COUNTED, 0) for _ in rows_by_source]
    with TokenWriter(output) as writer:
        for number, parts in groupby(by_source(documents(), rows_by_source), lambda part: part[0]):
            before = writer.num_rows, writer.num_documents, writer.num_tokens
            for rows, counted in _rows((part for _, part in parts), options):
                writer.append(rows.input_ids, rows.loss_mask, rows.lengths, counted, rows.document_ids)
            after = writer.num_rows, writer.num_documents, writer.num_tokens
            of_source[number] = dict(zip(_COUNTED, (b - a for a, b in zip(before, after, strict=True)), strict=True))
    rejected = rejects.close()
    dropped = {key.removeprefix("dropped."): n for key, n in sorted(counts.items()) if key.startswith("dropped.")}
    reasons = ", ".join(f"{n} {key}" for key, n in dropped.items()) or "there are none"
    if source_rows and counts["dropped.rejected"] == source_rows:
        raise DataError(
            f"{source}: all {source_rows} rows are set aside, so none is left; the first is {rejects.first}"
        )
    suspects = _suspects(options, data_format)
    if not label_tokens:
        raise DataError(
            f"{source}: no document with a supervised token is left of {source_rows} rows ({reasons}): check the "
            f"data's columns, {suspects}"
        )
    for (of, there), left in zip(sources or (), of_source, strict=False):
        if not left["rows"]:  # which training would find only when it draws from it
            raise DataError(
                f"data.source: {of}: no {name} row is left of its {there} (dropped of all sources: {reasons}): check "
                f"{suspects}, or remove it and its weight"
            )
    check_model_limits(tokenizer.path, max_token_id=max_token_id)
    return {
        "source_rows": source_rows,
        "rows": writer.num_rows,
        "documents": writer.num_documents,
        "tokens": writer.num_tokens,
        "label_tokens": label_tokens,
        "dropped": dropped,
        **({"rejected": rejected} if rejected["rows"] else {}),
        "truncated": counts["truncated"],
        "split": counts["split"],
        "special_token_text": counts["special_token_text"],
        "reasoning_left_out": counts["reasoning_left_out"],
        "packing_efficiency": writer.num_tokens / (writer.num_rows * options.seq_len),
        "document_tokens": lengths.result(),
        "max_token_id": max_token_id,
        **({"sources": of_source} if sources is not None else {}),
    }


def _suspects(options: Tokenize, data_format: str) -> str:
    """The settings for which no supervised token may be left, those of the loss where they are set."""
    keys = ["tokenize.seq_len", "long_documents", "min_label_tokens"]
    defaults = Tokenize()
    keys += [name for name in LOSS_KEYS if getattr(options, name) != getattr(defaults, name)]
    keys += ["the rows' own labels"] if data_format == "pretokenized" else []
    return f"{', '.join(keys[:-1])} and {keys[-1]}"


def settled(options: Tokenize, source_formats: Sequence[str]) -> Tokenize:
    """`options` for data that came in these formats.

    Prompts that we make of questions and their texts were never rendered by anybody before, so that a control token's
    text in them is somebody's words.
    """
    if options.special_text == "auto" and {*source_formats} <= {"squad", "multiple_choice"}:
        return options.model_copy(update={"special_text": "plain"})
    return options


def _rows(documents: Iterator[Documents], options: Tokenize) -> Iterator[tuple[Documents, NDArray[np.int64]]]:
    """Documents in row order and the number of documents of each row."""
    if options.packing:
        return pack_stream(documents, options.seq_len)
    return ((part, np.ones(len(part.lengths), dtype=np.int64)) for part in documents)


def report_split(name: str, split: dict[str, Any], options: Tokenize) -> None:
    """Log what became of a split's rows; whatever was left out or changed is a warning."""
    log.info(
        "%s: %d rows -> %d documents, %d tokens (%d supervised) in %d rows of at most %d, %.1f %% full",
        name,
        *(split[key] for key in ("source_rows", "documents", "tokens", "label_tokens", "rows")),
        options.seq_len,
        100 * split["packing_efficiency"],
    )
    for key, what in (("truncated", "cut off at"), ("split", "split at")):
        if split[key]:
            log.warning("%s: %d of %d rows %s %d tokens", name, split[key], split["source_rows"], what, options.seq_len)
    for reason, count in split["dropped"].items():
        log.warning("%s: %d %s dropped: %s", name, count, "documents" if reason == "few_labels" else "rows", reason)
    if split["special_token_text"]:
        log.warning(
            "%s: the texts of %d rows hold the text of control tokens, read as tokenize.special_text says",
            name,
            split["special_token_text"],
        )
    if split["reasoning_left_out"]:
        log.warning("%s: the chat template left out reasoning in %d rows", name, split["reasoning_left_out"])


def _encode(source: Path, name: str, num_workers: int, setup: _Setup) -> Iterator[Encoded]:
    """The encoded tasks of a split in file order."""
    data_format = setup[1]
    if data_format not in COLUMNS:
        raise DataError(f"{source}: unknown data format {data_format!r}: one of {', '.join(COLUMNS)}")
    file = _open(source, data_format)
    each = BYTES_PER_WORKER if _can_be_copied() else BYTES_PER_SERVED_WORKER
    num_workers = min(num_workers, 1 + table_bytes(file) // each)
    parts = _encode_here(file, setup) if num_workers <= 1 else _encode_in_processes(file, setup, num_workers)
    with ProgressBar(f"tokenize {name}", file.metadata.num_rows) as bar:  # after the processes: it may start a thread
        for part in parts:
            yield part
            bar.advance(part.source_rows)


def _tasks(file: pq.ParquetFile, data_format: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Pieces of the file with the number of their first row."""
    names = [c for c in ("id", "origin", *COLUMNS[data_format], *OPTIONAL_COLUMNS) if c in file.schema_arrow.names]
    size = table_bytes(file)
    task = min(max(size // TASKS, SMALLEST_TASK), LARGEST_TASK)
    rows = batch_rows(size, file.metadata.num_rows, task, ROWS_PER_TASK)
    first = 0
    try:
        for batch in file.iter_batches(batch_size=rows, columns=names, use_threads=False):
            yield first, batch
            first += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read rows of the Parquet file after row {first} ({error}): fetch the data again"
        ) from error


def _encode_here(file: pq.ParquetFile, setup: _Setup) -> Iterator[Encoded]:
    _start_worker(*setup)
    for first, batch in _tasks(file, setup[1]):
        yield _encode_task(first, batch)


def _encode_in_processes(file: pq.ParquetFile, setup: _Setup, num_workers: int) -> Iterator[Encoded]:
    """Starts the processes at once, the work with the first result asked for."""
    _start_worker(*setup)  # a tokenizer that cannot be used is found before any process starts
    if _can_be_copied():
        gc.freeze()  # a full collection writes to every object, which takes each process a copy of all the imports
        pool = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("fork"))
        pool.submit(os.getpid).result()  # all processes start with the first task
    else:
        context = multiprocessing.get_context("forkserver")  # a process that has the imports done and one thread
        context.set_forkserver_preload([__name__])
        pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker, initargs=setup)
    return _results(pool, _tasks(file, setup[1]), TASKS_AHEAD * num_workers)


def _can_be_copied() -> bool:
    """Whether this process may be forked as it is, with its imports and its tokenizer: no thread of Python's that could
    hold a lock runs beside this one. The libraries' threads (OpenBLAS's, jemalloc's) wait for work, and those libraries
    allow for a fork."""
    return sys.platform == "linux" and threading.active_count() == 1


def _results(pool: ProcessPoolExecutor, tasks: Iterable[tuple[int, pa.RecordBatch]], ahead: int) -> Iterator[Encoded]:
    """The encoded tasks in their order, at most so many of them handed out `ahead`."""
    waiting: deque[Future[Encoded]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_encode_task, *task))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a tokenising process died, perhaps for lack of memory: use fewer (--num-workers)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
        gc.unfreeze()


_encoder: DocumentEncoder | None = None  # one in each worker process


def _start_worker(tokenizer: TokenizerSource, data_format: str, options: Tokenize, reject: bool) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes share the cores, not threads within each
    _encoder = DocumentEncoder(tokenizer.load(), data_format, options, reject=reject)


def _encode_task(first: int, batch: pa.RecordBatch) -> Encoded:
    assert _encoder is not None
    return encode_batch(_encoder, first, batch)


def encode_batch(encoder: DocumentEncoder, first: int, batch: pa.RecordBatch) -> Encoded:
    """Encode rows `first`, `first + 1`, ... of a split."""
    encoder.counts.clear()
    encoder.rejected = []
    found = [(index, ids, mask) for index, (ids, mask) in encoder.encode_rows(rows_of(batch))]
    return Encoded(
        documents=Documents(
            input_ids=np.concatenate([np.empty(0, np.int32), *(ids for _, ids, _ in found)]),
            loss_mask=np.concatenate([np.empty(0, np.bool_), *(mask for _, _, mask in found)]),
            lengths=np.array([len(ids) for _, ids, _ in found], np.int64),
            document_ids=first + np.array([index for index, _, _ in found], np.int64),
        ),
        counts=Counter(encoder.counts),
        source_rows=batch.num_rows,
        rejected=encoder.rejected,
    )


def _open(source: Path, data_format: str) -> pq.ParquetFile:
    file = open_table(source)
    missing = [c for c in COLUMNS[data_format] if c not in file.schema_arrow.names]
    if missing:
        raise DataError(f"{source}: format {data_format} needs the column {missing[0]}: fetch the data again")
    return file
