"""Fine-tuning on a CPU: the train stage's engine against TRL's SFTTrainer and transformers' Trainer, same work.

    python benchmarks/train_cpu.py [--rounds 3] [--launcher "taskset -c 0"] [--results FILE.jsonl]

Every program trains the same LoRA adapter (same initial values) on the same documents in the same order with the same
optimizer: SmolLM2-135M and the function calls of the experiment `demo`, made by the workflow's own stages where
--model and --tokens do not name them. Each measurement is a process of its own; the programs take turns, and medians
over the rounds count. Tokens are real ones, padding left out. TRL is measured where it can be imported; it is no
dependency: `pip install --no-deps --target DIR trl`, then PYTHONPATH=DIR.

--results keeps every measurement in a file and takes those of an earlier run along (of the same commit and machine).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "workflow")]

from benchmarks.workload import ROOT, Measured, Task, measure

OURS = ["dayzero", "dayzero compiled"]
PEERS = [
    "trl defaults",
    "trl packed",
    "trl packed, 2 documents at a time",
    "trainer padded",
    "trainer packed",
    "trainer packed, 2 documents at a time",
    "trainer packed, 2 documents at a time, compiled",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="results/store/models/KEY (default: made by the workflow)")
    parser.add_argument("--tokens", type=Path, help="results/store/tokens/KEY (default: made by the workflow)")
    parser.add_argument("--ways", nargs="+", default=OURS + PEERS, help="which of the programs")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each program")
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps; one more warms up")
    parser.add_argument("--batch-size", type=int, default=8, help="documents in a step")
    parser.add_argument("--threads", type=int, default=1, help="OpenMP threads of each process")
    parser.add_argument("--launcher", default="", help="words before each process's command, e.g. taskset -c 0")
    parser.add_argument("--folder", type=Path, help="keep task.json, documents and adapter there, for benchmarks.ours")
    parser.add_argument("--results", type=Path, help="JSON lines: measurements are appended, earlier ones are used too")
    args = parser.parse_args()
    if not find_spec("trl"):
        args.ways = [way for way in args.ways if not way.startswith("trl")]
        print("TRL is not installed: left out")
    model, tokens = args.model, args.tokens
    if model is None or tokens is None:
        model, tokens = through_the_stages()
    found: list[Measured] = []
    if args.results and args.results.exists():
        found = [Measured(**json.loads(line)) for line in args.results.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        task = Task(
            model=str(model.resolve()),
            documents=str(folder / "documents.jsonl"),
            adapter=str(folder / "adapter"),
            batch_size=args.batch_size,
            steps=args.steps + 1,
        )
        made = ["prepare", task.model, str(tokens.resolve()), str(folder), str(task.rank), str(task.alpha)]
        measure("benchmarks.ours", made, environment=environment)
        (folder / "task.json").write_text(json.dumps(asdict(task)))
        for number in range(args.rounds):
            for way in args.ways:
                module = "benchmarks.ours" if way.startswith("dayzero") else "benchmarks.peers"
                one = measure(module, [str(folder / "task.json"), way], launcher=args.launcher, environment=environment)
                found.append(one)
                rates = f"{one.rate(1):.0f} tokens/s, {one.cpu_rate(1):.0f} a second of CPU"
                print(f"round {number + 1}, {way}: {rates}, {one.peak_gib:.2f} GiB", flush=True)
                if args.results:
                    with open(args.results, "a") as file:
                        file.write(json.dumps(asdict(one)) + "\n")
    print_table(found)


def through_the_stages() -> tuple[Path, Path]:
    """Model and tokens of the demo's run `lora`, made by Snakemake where they are not there yet."""
    from dayzero.experiment import experiment_path, load_experiment
    from dayzero.wiring import Wiring

    wiring = Wiring(load_experiment(experiment_path("demo", ROOT / "config/experiments")), "results")
    run = wiring.run("lora")
    model, tokens = wiring.model(run), wiring.tokens(run)
    assert model is not None
    targets = [f"{model}/manifest.json", f"{tokens}/manifest.json"]
    command = [sys.executable, "-m", "snakemake", "--cores", "all", "--config", "experiment=demo", "--", *targets]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PATH": _path()})
    return ROOT / model, ROOT / tokens


def _path() -> str:
    """The rules call `python`: this one."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


def print_table(found: list[Measured]) -> None:
    """Medians by program, each against ours; and the losses of every step."""
    ways = list(dict.fromkeys(one.way for one in found))
    by_way = {w: [m for m in found if m.way == w] for w in ways}
    rates, cpu_rates, peaks = (
        {w: median(of(m) for m in by_way[w]) for w in ways}
        for of in (lambda m: m.rate(1), lambda m: m.cpu_rate(1), lambda m: m.peak_gib)
    )
    losses = {w: by_way[w][0].losses for w in ways}
    ours = next((w for w in ways if w.startswith("dayzero")), ways[0])
    print("\nTokens a second of wall time and of CPU time, peak memory in GiB; ours as a multiple of each.")
    print("The last column: the largest difference of a step's loss from ours.\n")
    head = "wall", "ours", "CPU", "ours", "GiB", "ours", "loss", "rounds"
    print(f"| {'':38} | " + " | ".join(head) + " |\n|---|" + "---:|" * len(head))
    for way in ways:
        cells: list[str] = []
        for name, values in (("rate", rates), ("cpu", cpu_rates), ("peak", peaks)):
            cells += [
                f"{values[way]:.2f}" if name == "peak" else f"{values[way]:.0f}",
                f"{values[ours] / values[way]:.2f}",
            ]
        difference = max(abs(a - b) for a, b in zip(losses[ours], losses[way], strict=True))
        print(f"| {way:38} | " + " | ".join([*cells, f"{difference:.4f}", str(len(by_way[way]))]) + " |")
    print("\n| step | " + " | ".join(ways) + " |\n|---:|" + "---:|" * len(ways))
    for step in range(len(losses[ours])):
        print(f"| {step + 1} | " + " | ".join(f"{losses[way][step]:.4f}" for way in ways) + " |")


if __name__ == "__main__":
    main()
