"""Tokenising and packing against the raw tokenizer and against `datasets.map` + TRL's packing: same rows, one run.

    python benchmarks/data.py --tokenizer results/store/models/KEY --text results/store/data/KEY/train.parquet

Verses (or whatever rows the file's `text` column has) are joined into documents of mixed length, and, where the
tokenizer has a chat template, into conversations of one to three questions and answers. Every way is run in turn,
several times over, each time in a process of its own, as a stage is: what else a process holds slows the ones down that
are copied from it. The best counts, in seconds of wall time and of CPU time of all its processes. CPU time is what to
compare on a machine that others use too: `of raw` divides raw's by a way's, and two processes can be at most twice the
ratio of CPU seconds faster than one. Ours includes loading the tokenizer and starting the processes; what one process
takes without loading is told apart. Of conversations, raw is given the text that the template makes,
ours makes it and finds what is supervised: so its cost is told apart too. The peer's conversations have no masks. What
two processes of the raw tokenizer make of half the rows each, in memory, is as much as two cores can give.

`--chunks` leaves all that out and compares, a hundred rows at a time, what the raw tokenizer takes to encode them and
one of our processes to read, encode, pack and write them, each in turn and many times over: the sum of the least CPU
times is what no other work on the machine disturbed. TRL is measured where it can be imported; it is no dependency:
`pip install --no-deps --target DIR trl`, then PYTHONPATH=DIR.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tqdm
from dayzero.config import Tokenize
from dayzero.data.chat import ChatEncoder
from dayzero.data.documents import DocumentEncoder
from dayzero.data.loader import TrainBatches
from dayzero.data.packing import best_fit_rows, pack_stream
from dayzero.data.stored_table import open_table, rows_of
from dayzero.data.tokenization import encode_batch, tokenize_split
from dayzero.data.tokenizer import TokenizerSource
from dayzero.data.tokens import TokenRows, TokenWriter

HAS_TRL = importlib.util.find_spec("trl") is not None
NO_TRL = (
    "datasets.map + TRL: not measured, TRL cannot be imported: pip install --no-deps --target DIR trl==1.16.0, then "
    "run again with PYTHONPATH=DIR"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, type=Path, help="HF directory")
    parser.add_argument("--text", required=True, type=Path, help="Parquet file with a column `text`")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--chunks", action="store_true", help="only compare a hundred rows at a time")
    args = parser.parse_args()
    if not HAS_TRL and not args.chunks:
        print(NO_TRL, flush=True)
    check_text(parser, args.text)
    with tempfile.TemporaryDirectory() as folder:
        texts = mixed_documents(args.text, args.documents)
        compare = in_chunks if args.chunks else tokenise_and_pack
        compare(args, Work.of(texts, "text", Path(folder) / "text"))
        if not args.chunks:
            load(args, Path(folder) / "text")
        tokenizer = TokenizerSource(args.tokenizer).load()
        if tokenizer.chat_template:
            compare(args, Work.of(conversations(texts), "messages", Path(folder) / "messages"))


def check_text(parser: argparse.ArgumentParser, file: Path) -> None:
    """End with one line where the file is no Parquet with texts."""
    try:
        names = pq.read_schema(file).names
    except (OSError, pa.ArrowException) as error:
        parser.error(f"--text {file}: {' '.join(str(error).split())}: give a Parquet file with a column text")
    if "text" not in names:
        parser.error(
            f"--text {file}: it has the columns {', '.join(names)} and no text: give the train.parquet of data of the "
            "format text, such as that of config/experiments/methods.yaml (`format: text` in its manifest.json)"
        )


@dataclass(frozen=True)
class Work:
    """Rows of one format, in a file."""

    format: str
    folder: Path

    @classmethod
    def of(cls, rows: list[Any], data_format: str, folder: Path) -> Work:
        """Write the rows to the new folder."""
        folder.mkdir()
        work, number = cls(data_format, folder), [str(i) for i in range(len(rows))]
        pq.write_table(pa.table({"id": number, "origin": number, data_format: rows}), work.file, row_group_size=1000)
        return work

    @property
    def file(self) -> Path:
        return self.folder / "rows.parquet"

    @property
    def num_rows(self) -> int:
        return pq.read_metadata(self.file).num_rows

    def rows(self) -> list[Any]:
        return pq.read_table(self.file, columns=[self.format]).column(0).to_pylist()

    def rendered(self, tokenizer: Any) -> list[str]:
        """What a tokenizer reads of each row."""
        rows = self.rows()
        if self.format == "text":
            return rows
        return [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]


def conversations(texts: list[str]) -> list[list[dict[str, str]]]:
    """One to three texts as answers, each to its own first words."""
    counts = np.random.default_rng(1).integers(1, 4, len(texts)).tolist()
    rows, left = [], iter(texts)
    for count in counts:
        answers = [text for _, text in zip(range(count), left, strict=False)]
        turns = [(("user", text[:100]), ("assistant", text)) for text in answers]
        rows.append([{"role": role, "content": text} for turn in turns for role, text in turn])
    return [row for row in rows if row]


def mixed_documents(file: Path, count: int) -> list[str]:
    """Documents of one to some hundred rows of the file, read round and round."""
    source = pq.read_table(file, columns=["text"]).column("text").to_pylist()
    sizes = np.random.default_rng(0).lognormal(1.5, 1.0, count).astype(int) + 1
    ends = np.cumsum(sizes)
    return [
        " ".join(source[i % len(source)] for i in range(end - size, end))
        for size, end in zip(sizes.tolist(), ends.tolist(), strict=True)
    ]


def tokenise_and_pack(args: argparse.Namespace, work: Work) -> None:
    """Print the table of tokenising and packing."""
    ways: dict[str, tuple[Callable[..., Way], int]] = {
        "tokenizers encode_batch": (raw, 1),
        "the same, 2 processes": (raw, 2),
        "dayzero, 1 process": (ours, 1),
        "dayzero, 2 processes": (ours, 2),
    }
    if work.format == "messages":
        ways["of it, rendering the template"] = rendering, 1
    if HAS_TRL:
        ways |= {"datasets.map + TRL, 1 process": (peer, 1), "datasets.map + TRL, 2 processes": (peer, 2)}
    made: dict[str, tuple[int, int]] = {}
    wall = dict.fromkeys(ways, float("inf"))
    cpu = dict.fromkeys(ways, float("inf"))
    loading = float("inf")
    for _ in range(args.repeat):
        for name, (way, processes) in ways.items():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                found = fresh.submit(measure, way, args.tokenizer, args.seq_len, work, processes).result()
            made[name] = found.tokens, found.rows
            wall[name], cpu[name] = min(wall[name], found.wall), min(cpu[name], found.cpu)
            loading = min(loading, found.loading)
    print(f"\n{work.num_rows:,} rows of format {work.format}, rows of {args.seq_len} tokens, best of {args.repeat}")
    print(f"{'':32} {'tokens':>12} {'filled':>8} {'wall s':>8} {'CPU s':>8} {'of raw, CPU':>12} {'of raw, wall':>13}")
    base = "tokenizers encode_batch"
    for name, (tokens, rows) in made.items():
        filled = f"{100 * tokens / rows / args.seq_len:.2f} %" if rows else ""
        of_raw = [f"{100 * seconds[base] / seconds[name]:.0f} %" for seconds in (cpu, wall)]
        print(f"{name:32} {tokens:12,} {filled:>8} {wall[name]:8.2f} {cpu[name]:8.2f} {of_raw[0]:>12} {of_raw[1]:>13}")
    net = cpu["dayzero, 1 process"] - loading
    print(
        f"loading the tokenizer: {loading:.2f} s of CPU; one process without it: {100 * cpu[base] / net:.0f} % of raw"
    )
    if work.format == "messages":
        net -= cpu["of it, rendering the template"]
        print(f"and without rendering the template: {100 * cpu[base] / net:.0f} % of raw")
    one, two = (f"dayzero, {n}" for n in ("1 process", "2 processes"))
    allowed = wall[base] / wall["the same, 2 processes"]
    print(
        f"two processes: {wall[one] / wall[two]:.2f} x in wall time; by CPU seconds {2 * cpu[one] / cpu[two]:.2f} x; "
        f"the raw tokenizer {allowed:.2f} x"
    )
    lengths = np.diff(np.load(work.folder / "ours1/document_offsets.npy"))
    fewest = len(best_fit_rows(lengths, args.seq_len)[1])
    rows = made["dayzero, 1 process"][1]
    more = 100 * rows / fewest - 100
    print(f"rows: {rows:,} in one pass, {fewest:,} by the offline best-fit-decreasing: {more:+.3f} %", flush=True)


class Measured(NamedTuple):
    tokens: int
    rows: int
    wall: float
    """Seconds."""
    cpu: float
    """Seconds of this process and of all that it started."""
    loading: float
    """CPU seconds of loading the tokenizer."""


Way = Callable[[], tuple[int, int]]
"""Makes tokens, and rows of them or 0."""


def measure(make: Callable[..., Way], tokenizer: Path, seq_len: int, work: Work, processes: int) -> Measured:
    """Run one way; in a process of its own, as every stage has: what else a process holds slows its copies down."""
    tqdm.tqdm.monitor_interval = 0  # no thread: ours copies its process only where there is none
    source = TokenizerSource(tokenizer)
    source.load()  # what it imports
    before = cpu_seconds()
    loaded = source.load()
    loading = cpu_seconds() - before
    way = make(work, source, loaded, seq_len, processes)
    start, before = time.perf_counter(), cpu_seconds()
    tokens, rows = way()
    return Measured(tokens, rows, time.perf_counter() - start, cpu_seconds() - before, loading)


def raw(work: Work, source: TokenizerSource, tokenizer: Any, seq_len: int, processes: int) -> Way:
    """The tokenizer's own library, all texts in memory."""
    texts = work.rendered(tokenizer)

    def apart() -> tuple[int, int]:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            tokens = sum(pool.starmap(encode, [(tokenizer, texts[i::processes]) for i in range(processes)]))
            pool.close()
            pool.join()
        return tokens, 0

    return apart if processes > 1 else lambda: (encode(tokenizer, texts), 0)


def ours(work: Work, source: TokenizerSource, tokenizer: Any, seq_len: int, processes: int) -> Way:
    """The stage's work, from file to files."""
    output = work.folder / f"ours{processes}"
    shutil.rmtree(output, ignore_errors=True)

    def way() -> tuple[int, int]:
        made = tokenize_split(
            work.file,
            output,
            name="rows",
            data_format=work.format,
            tokenizer=source,
            options=Tokenize(seq_len=seq_len),
            num_workers=processes,
        )
        return made["tokens"], made["rows"]

    return way


def peer(work: Work, source: TokenizerSource, tokenizer: Any, seq_len: int, processes: int) -> Way:
    """What people write with datasets and TRL, from file to Arrow files."""
    import datasets
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    cache = tempfile.mkdtemp(dir=work.folder)
    workers = processes if processes > 1 else None

    def tokens_of(batch: dict[str, list[str]]) -> dict[str, Any]:
        if work.format == "messages":
            ids = tokenizer.apply_chat_template(batch["messages"], return_dict=True)["input_ids"]
            return {"input_ids": [i[:seq_len] for i in ids]}
        ids, eos = tokenizer(batch["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
        return {"input_ids": [[*i, eos][:seq_len] for i in ids]}

    def way() -> tuple[int, int]:
        data = datasets.Dataset.from_parquet(str(work.file), cache_dir=cache)
        encoded = data.map(tokens_of, batched=True, remove_columns=data.column_names, num_proc=workers)
        packed = pack_dataset(encoded, seq_len, "bfd", {"num_proc": workers})
        lengths = packed.with_format("arrow")["input_ids"]
        return sum(len(flat) for chunk in lengths.chunks for flat in [chunk.flatten()]), len(packed)

    return way


def rendering(work: Work, source: TokenizerSource, tokenizer: Any, seq_len: int, processes: int) -> Way:
    """Only the chat template, of rows in memory."""
    rows, encoder = work.rows(), ChatEncoder(tokenizer, Tokenize())

    def way() -> tuple[int, int]:
        for row in rows:
            encoder.render(row)
        return 0, 0

    return way


def encode(tokenizer: Any, texts: list[str]) -> int:
    """The tokens that the tokenizer's own library makes of the texts."""
    tokens, backend = 0, tokenizer.backend_tokenizer
    for start in range(0, len(texts), 256):
        part = backend.encode_batch(texts[start : start + 256], add_special_tokens=False)
        tokens += sum(len(encoding.ids) for encoding in part)
    return tokens


def in_chunks(args: argparse.Namespace, work: Work) -> None:
    """Print what the raw tokenizer and ours take for the same rows, a hundred at a time, packed and written too."""
    tokenizer = TokenizerSource(args.tokenizer).load()
    backend = TokenizerSource(args.tokenizer).load().backend_tokenizer
    encoder = DocumentEncoder(tokenizer, work.format, Tokenize(seq_len=args.seq_len))
    texts = work.rendered(tokenizer)
    seconds = dict.fromkeys(("encode_batch", "dayzero", "of it, reading and rendering"), 0.0)
    tokens = done = 0
    with TokenWriter(work.folder / "chunks") as writer:
        for batch in open_table(work.file).iter_batches(100, use_threads=False):
            part = texts[done : done + len(batch)]

            def raw(part: list[str] = part) -> int:
                return sum(len(encoding.ids) for encoding in backend.encode_batch(part, add_special_tokens=False))

            def ours(batch: pa.RecordBatch = batch, first: int = done) -> int:
                documents = encode_batch(encoder, first, batch).documents
                for rows, counted in pack_stream([documents], args.seq_len):
                    writer.append(rows.input_ids, rows.loss_mask, rows.lengths, counted, rows.document_ids)
                return len(documents.input_ids)

            def render(batch: pa.RecordBatch = batch) -> int:
                rows = rows_of(batch)
                return sum(encoder._render(row) is not None for row in rows) if work.format == "messages" else len(rows)

            least = dict.fromkeys(seconds, float("inf"))
            for _ in range(args.repeat):
                for name, way in zip(seconds, (raw, ours, render), strict=True):
                    before = time.thread_time()
                    made = way()
                    least[name] = min(least[name], time.thread_time() - before)
                    tokens += made if name == "encode_batch" else 0
            seconds = {name: seconds[name] + least[name] for name in seconds}
            done += len(batch)
    base = seconds["encode_batch"]
    print(f"\n{len(texts):,} rows of format {work.format}, {tokens // args.repeat:,} tokens, least of {args.repeat}")
    for name, spent in seconds.items():
        print(f"{name:32} {spent:8.3f} CPU s, {1e-3 * tokens / args.repeat / spent:10.0f} k tokens a CPU second")
    print(f"of raw: {100 * base / seconds['dayzero']:.0f} %", flush=True)


def load(args: argparse.Namespace, folder: Path) -> None:
    """Print how many tokens a second the loader gives from the page cache."""
    torch.set_num_threads(1)
    rows = TokenRows(folder / "ours1")
    print(f"\nloader, {len(rows):,} rows, micro-batches of 8, page cache warm, M tokens/s:")
    for workers in (0, 1):
        rates = dict.fromkeys(("of wall time", "of the training process's CPU time", "of the worker's CPU time"), 0.0)
        for _ in range(args.repeat):
            epochs = max(8, 20_000 // len(rows))
            batches = TrainBatches(
                rows, global_batch_size=32, local_batch_size=8, num_epochs=epochs, num_workers=workers
            )
            before = time.perf_counter(), *own_and_others_seconds()
            tokens = sum(batch.num_tokens for batch in batches)
            after = time.perf_counter(), *own_and_others_seconds()
            for name, start, end in zip(rates, before, after, strict=True):
                rates[name] = max(rates[name], tokens / (end - start) if end > start else 0.0)
        what = "one worker process" if workers else "in the training process"
        print(f"{what:24} " + ", ".join(f"{rate / 1e6:.1f} {name}" for name, rate in rates.items() if rate))


def cpu_seconds() -> float:
    """User and system time of this process and of all that it started, running or ended."""
    return sum(own_and_others_seconds())


def own_and_others_seconds() -> tuple[float, float]:
    """User and system time of this process, and of all that it started, running or ended."""
    me = psutil.Process()
    times = me.cpu_times()
    others = times.children_user + times.children_system
    for process in me.children(recursive=True):
        used = process.cpu_times()
        others += used.user + used.system + used.children_user + used.children_system
    return times.user + times.system, others


if __name__ == "__main__":
    main()
