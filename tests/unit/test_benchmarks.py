"""The benchmarks' own code: they measure the same work everywhere, and the GPU one checks itself on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.train_cpu import print_table
from benchmarks.train_gpu import CASES
from benchmarks.workload import MARK, Clock, Measured, Task, lengths_by_step, measure, peak_resident_gib

ROOT = Path(__file__).parents[2]


def measured(way: str, seconds: float, peak: float, loss: float) -> Measured:
    return Measured(
        way=way,
        step_seconds=[100.0, seconds, seconds],
        step_cpu_seconds=[100.0, seconds / 2, seconds / 2],
        losses=[3.0, loss, 1.0],
        num_tokens=[10, 60, 40],
        peak_gib=peak,
    )


def test_warm_up_steps_are_left_out_of_a_rate() -> None:
    one = measured("dayzero", 5.0, 1.0, 2.0)
    assert one.rate(1) == pytest.approx(10.0)
    assert one.cpu_rate(1) == pytest.approx(20.0)


def test_the_table_takes_medians_and_says_how_far_losses_are_apart(capsys: pytest.CaptureFixture[str]) -> None:
    ours = [measured("dayzero", seconds, 2.0, 2.0) for seconds in (1.0, 5.0, 500.0)]
    print_table([*ours, measured("trl packed", 10.0, 4.0, 2.25)])
    lines = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in next(line for line in lines if "trl packed" in line).split("|")[1:-1]]
    assert cells == ["trl packed", "5", "2.00", "10", "2.00", "4.00", "0.50", "0.2500", "1"]


def test_tokens_of_a_step_are_those_of_its_documents(tmp_path: Path) -> None:
    file = tmp_path / "documents.jsonl"
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in (3, 4, 5, 6, 7)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task(model="", documents=str(file), batch_size=2, steps=2)
    assert lengths_by_step(task, task.read_documents()) == [7, 11]


def test_a_measurement_is_a_process_of_its_own_with_a_peak_of_its_own(tmp_path: Path) -> None:
    held = bytearray(200 * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    script = tmp_path / "child.py"
    script.write_text(
        "from benchmarks.workload import Measured, report\n"
        "report(Measured(way='x', step_seconds=[], step_cpu_seconds=[], losses=[], num_tokens=[]))\n"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True)
    found = Measured(**json.loads(done.stdout.removeprefix(MARK)))
    assert 0 < found.peak_gib < 0.1 < peak_resident_gib()
    with pytest.raises(RuntimeError, match="No module named"):
        measure("benchmarks.nowhere", [])


def test_a_clock_has_a_span_for_every_step() -> None:
    clock = Clock()
    clock.start()
    for _ in range(3):
        clock.tick()
    spans = clock.spans()
    assert [len(spans[key]) for key in ("step_seconds", "step_cpu_seconds")] == [3, 3]


ON_A_CPU = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def self_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/train_gpu.py"), "--self-check", *arguments]
    return subprocess.run(command, env=ON_A_CPU, capture_output=True, text=True, timeout=600)


def test_the_gpu_benchmark_checks_itself_on_a_cpu() -> None:
    """All but the compiled settings, whose compiling takes minutes here."""
    ways = ["dayzero bf16", *(["dayzero fp8"] if find_spec("torchao") else []), "trainer", "plain loop"]
    done = self_check("--ways", *ways)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ") and "tokens/s" not in line]
    rows = [line.split("|")[1:-1] for line in lines]
    assert [row[0].strip() for row in rows] == ways * len(CASES)
    for start in range(0, len(rows), len(ways)):
        last = [float(row[-1]) for row in rows[start : start + len(ways)]]
        assert max(last) - min(last) < 0.02 * max(last), "the programs do not train alike"


def test_a_self_check_that_fails_says_so() -> None:
    done = self_check("--cases", "llama-3.1-8b-lora", "--ways", "nothing like it")
    assert done.returncode == 2
    assert "no program is called nothing like it: choose from dayzero bf16, " in done.stderr
    if find_spec("trl"):
        pytest.skip("TRL is installed")
    done = self_check("--cases", "llama-3.1-8b-lora", "--ways", "trl")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == "the self-check failed: llama-3.1-8b-lora, trl: No module named 'trl'"


def test_the_operations_of_a_step_check_themselves_on_a_cpu() -> None:
    """What is not here is only what the packages or the processor lack."""
    command = [sys.executable, str(ROOT / "benchmarks/operations.py"), "--self-check", "--repeat", "1"]
    done = subprocess.run(command, env=ON_A_CPU, capture_output=True, text=True, timeout=300, check=True)
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 9 + 5 + 2 * 4
    missing = {row[0].strip().split(",")[0] for row in rows if "not here" in row[1]}
    assert missing <= {"the same: varlen", "cut_cross_entropy", "liger_fused"}
    assert all(float(row[1]) > 0 for row in rows if "not here" not in row[1])


def test_the_data_benchmark_says_what_it_cannot_measure(tmp_path: Path) -> None:
    """TRL where it is not installed, and a file that holds no texts, each in one line."""
    chats = tmp_path / "chats.parquet"
    pq.write_table(pa.table({"id": ["1"], "messages": [[{"role": "user"}]]}), chats)
    command = [sys.executable, str(ROOT / "benchmarks/data.py"), "--tokenizer", str(tmp_path), "--text", str(chats)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert f"--text {chats}: it has the columns id, messages and no text: give the train.parquet of data" in last
    missing = find_spec("trl") is None
    assert missing == ("datasets.map + TRL: not measured, TRL cannot be imported: pip install" in done.stdout)


def test_without_a_gpu_the_gpu_benchmark_says_so_in_one_line() -> None:
    import torch

    from benchmarks.train_gpu import require_gpu

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        require_gpu()
