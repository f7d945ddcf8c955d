"""What our rules cost: planning a sweep of many runs, with everything to do and with nothing to do, against bare rules.

    python benchmarks/workflow.py [--runs 1000] [--repeat 3]

The bare workflow has the same jobs with the same files and the same edges between them (so its `all`, too, asks for
every file of the report), but empty rules: no command, log, function, parameter or resource. Times are medians of
processor seconds, taken in turn, so that a busy machine hits both alike.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.workflow.project import make_project

EXPERIMENT = """
description: a sweep
defaults:
  model.source: local/model
  data: {{source: local/rows.jsonl, validation_size: 2, test_size: 2}}
  train: {{max_steps: 2, global_batch_size: 4, local_batch_size: 4}}
  evaluate.tasks: [exact]
runs:
{runs}
"""
BARE = """
RUNS = [f"r{{i}}" for i in range({runs})]
E, S = "results/tiny", "results/store"
PLOTS = [f"{{E}}/report/{{i}}.svg" for i in range(8)]

wildcard_constraints:
    run="[A-Za-z0-9][A-Za-z0-9_.-]*"

rule report:
    input:
        expand("{{e}}/{{r}}/config.json", e=E, r=RUNS),
        f"{{S}}/data/d/manifest.json", f"{{S}}/tokens/t/manifest.json", f"{{S}}/models/m/manifest.json",
        f"{{S}}/checks/c/manifest.json",
        expand("{{e}}/{{r}}/train/{{f}}", e=E, r=RUNS, f=["metrics.jsonl", "summary.json"]),
        expand("{{e}}/{{r}}/model/manifest.json", e=E, r=RUNS),
        expand("{{e}}/{{r}}/eval/results.json", e=E, r=RUNS),
        expand("{{e}}/{{r}}/serve/parity.json", e=E, r=RUNS),
    output: f"{{E}}/report/index.html", f"{{E}}/report/results.csv", f"{{E}}/report/results.tex", *PLOTS

rule all:
    default_target: True
    input: rules.report.input, rules.report.output

rule resolve_config:
    output: "results/tiny/{{run}}/config.json"

rule fetch_model:
    output: "results/store/models/m/manifest.json"

rule fetch_data:
    output: "results/store/data/d/manifest.json"

rule check_data:
    input: "results/store/data/d/manifest.json"
    output: "results/store/checks/c/manifest.json"

rule tokenize:
    input: "results/store/data/d/manifest.json", "results/store/models/m/manifest.json"
    output: "results/store/tokens/t/manifest.json"

rule train:
    input: "results/store/tokens/t/manifest.json", "results/store/models/m/manifest.json"
    output: "results/tiny/{{run}}/train/metrics.jsonl", "results/tiny/{{run}}/train/summary.json"

rule export:
    input: "results/store/models/m/manifest.json", "results/tiny/{{run}}/train/summary.json"
    output: "results/tiny/{{run}}/model/manifest.json"

rule evaluate:
    input: "results/tiny/{{run}}/model/manifest.json", "results/store/data/d/manifest.json"
    output: "results/tiny/{{run}}/eval/results.json", "results/tiny/{{run}}/eval/samples.jsonl"

rule verify_serving:
    input: "results/tiny/{{run}}/model/manifest.json", "results/store/tokens/t/manifest.json"
    output: "results/tiny/{{run}}/serve/parity.json"
"""


def seconds(folder: Path, *arguments: str) -> float:
    """Processor seconds of one Snakemake that must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow"), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "snakemake", "--quiet", "all", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def make_outputs(folder: Path) -> None:
    """Every file that a rule would write, so that nothing is left to do."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--dry-run", "--quiet", "progress"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow")}
    printed = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=True).stdout
    for line in printed.splitlines():
        if line.strip().startswith("output: "):
            for name in line.partition("output: ")[2].split(", "):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text("{}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dayzero-sweep-") as root:
        ours, bare = Path(root) / "ours", Path(root) / "bare"
        runs = "\n".join(f"  r{i}: {{seed: {i}}}" for i in range(args.runs))
        make_project(ours, EXPERIMENT.format(runs=runs))
        bare.mkdir()
        (bare / "Snakefile").write_text(BARE.format(runs=args.runs))
        print(f"{args.runs} runs, {5 * args.runs + 5} jobs, medians of {args.repeat} (processor seconds)")
        for title in ("everything to do", "nothing to do"):
            if title == "nothing to do":
                for folder in (ours, bare):
                    make_outputs(folder)
                    seconds(folder, "--touch", "--cores", "1000", "--scheduler", "greedy")
            times: dict[Path, list[float]] = {ours: [], bare: []}
            for _ in range(args.repeat):
                for folder, taken in times.items():
                    taken.append(seconds(folder, "--dry-run", "--cores", "1"))
            mine, theirs = median(times[ours]), median(times[bare])
            print(f"{title:18} dayzero {mine:6.2f} s   bare {theirs:6.2f} s   ratio {mine / theirs:.2f}", flush=True)


if __name__ == "__main__":
    main()
