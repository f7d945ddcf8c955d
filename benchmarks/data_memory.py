"""Peak memory of the three data stages for one text file of growing size: it must not grow with it.

    python benchmarks/data_memory.py --tokenizer results/store/models/KEY --text results/store/data/KEY/train.parquet \
        --sizes 0.2 1 5 --workers 2

Lines of one to eight rows of the file's `text` column are written at random until a text file has so many gigabytes.
Then each stage runs as the workflow runs it. `peak` is the most memory that a stage's processes had together, sampled
five times a second: their proportional set sizes, so that pages which several share, and the page cache behind memory
maps, count once. What was written before is deleted as soon as it is not needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq

STAGES = ("fetch_data", "check_data", "tokenize")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, type=Path, help="HF directory")
    parser.add_argument("--text", required=True, type=Path, help="Parquet file with a column `text`")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.2, 1.0], help="gigabytes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--last", choices=STAGES, default=STAGES[-1], help="the last stage to run")
    parser.add_argument("--folder", type=Path, help="where the files are made; default: the system's temporary folder")
    args = parser.parse_args()
    print(
        f"{'GB':>6} {'rows':>12} {'stage':>12} {'peak MiB':>9} {'wall s':>8} {'CPU s':>8} {'MB a CPU s':>11}",
        flush=True,
    )
    for size in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            measure(args, size, Path(folder))


def measure(args: argparse.Namespace, size: float, folder: Path) -> None:
    """Print a line for each stage."""
    text, data = folder / "corpus.txt", folder / "data"
    rows = write_text(args.text, text, size * 1e9)
    options = {"seq_len": args.seq_len, "long_documents": "split"}
    config = {"data": {"source": str(text), "validation_size": 0.001}, "tokenize": options}
    given = ["--config", json.dumps(config)]
    workers = ["--tokenizer", str(args.tokenizer), "--num-workers", str(args.workers)]
    tasks = ["--tasks-dir", str(folder), "--data", str(data)]
    outputs = {
        "fetch_data": ["--output", str(data)],
        "check_data": [*tasks, "--output", str(folder / "check")],
        "tokenize": ["--data", str(data), *workers, "--output", str(folder / "tokens")],
    }
    for stage in STAGES[: STAGES.index(args.last) + 1]:
        arguments = outputs[stage]
        command = [sys.executable, "-m", f"dayzero.stages.{stage}", *given, *arguments]
        peak, wall, cpu = watch(command, folder / f"{stage}.log")
        rate = f"{size * 1e3 / cpu:11.1f}"
        print(f"{size:6.2f} {rows:12,} {stage:>12} {peak:9.0f} {wall:8.0f} {cpu:8.0f} {rate}", flush=True)
        text.unlink(missing_ok=True)


def write_text(source: Path, file: Path, size: float) -> int:
    """Make the text file; returns its lines."""
    rows = pq.read_table(source, columns=["text"]).column("text").to_pylist()
    rng = np.random.default_rng(0)
    lines = 0
    with open(file, "w", encoding="utf-8") as out:
        while out.tell() < size:
            counts = rng.integers(1, 9, 1000)
            chosen = iter(rng.integers(0, len(rows), counts.sum()).tolist())
            out.writelines(" ".join(rows[next(chosen)] for _ in range(count)) + "\n" for count in counts.tolist())
            lines += 1000
    return lines


def watch(command: list[str], log: Path) -> tuple[float, float, float]:
    """Peak memory in MiB of a command and all that it starts, its seconds, and their CPU seconds."""
    start = time.perf_counter()
    peak, used = 0.0, {}
    with open(log, "w") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            memory = 0.0
            for part in (process, *process.children(recursive=True)):
                try:
                    memory += part.memory_full_info().pss
                    times = part.cpu_times()
                    used[part.pid] = times.user + times.system
                except psutil.Error:
                    continue
            peak = max(peak, memory)
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text()}")
    return peak / 2**20, time.perf_counter() - start, sum(used.values())


if __name__ == "__main__":
    main()
