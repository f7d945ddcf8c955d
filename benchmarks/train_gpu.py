"""Training on one CUDA GPU: dayzero's engine against transformers' Trainer, TRL and a plain PEFT loop, same work.

    python benchmarks/train_gpu.py [--cases llama-3.1-8b-lora ...] [--rounds 1] [--results FILE.jsonl]
    python benchmarks/train_gpu.py --self-check        # tiny shapes through the same code, on a CPU too

Models have random weights made from their config, tokens are random: nothing is downloaded. A step has 32 documents of
4096 tokens, 2 in a forward pass; 10 steps warm up and 20 are timed. Each measurement is a process of its own. TFLOP/s
and MFU count what the model's training needs (docs/performance-notes.md), the same for every program. Peers take part
where they can be imported; they are no dependencies: `pip install --no-deps --target DIR trl liger-kernel`, then
PYTHONPATH=DIR.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "workflow")]

from benchmarks.workload import Measured, Task, measure

LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
         "vocab_size": 128256, "rope_theta": 500000.0, "num_key_value_heads": 8}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32},
    "qwen2.5-7b": {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
                   "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                   "rope_theta": 1000000.0, "max_position_embeddings": 131072},
    "llama-3.2-1b": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                     "num_attention_heads": 32, "head_dim": 64, "tie_word_embeddings": True},
    "llama-3.2-3b": {**LLAMA, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                     "num_attention_heads": 24, "head_dim": 128, "tie_word_embeddings": True},
}  # fmt: skip
"""Sizes of the published configs: huggingface.co/meta-llama/Llama-3.1-8B, Qwen/Qwen2.5-7B, and so on. Llama's scaling
of rotary frequencies, a table made once, is left out."""

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 256}  # fmt: skip

CASES: dict[str, tuple[str, str]] = {
    "llama-3.1-8b-lora": ("llama-3.1-8b", "lora"),
    "qwen2.5-7b-lora": ("qwen2.5-7b", "lora"),
    "llama-3.2-1b-full": ("llama-3.2-1b", "full"),
    "llama-3.2-3b-full": ("llama-3.2-3b", "full"),
    "llama-3.2-1b-pretrain": ("llama-3.2-1b", "pretrain"),
}
"""Name -> (model, method). Full training supervises the second half of each document, pretraining every token."""

PEERS = ["trainer", "trainer liger", "trl", "trl liger", "plain loop", "plain loop liger"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--ways", nargs="+", help="which programs (default: all that are installed)")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each program")
    parser.add_argument("--steps", type=int, default=20, help="timed optimizer steps")
    parser.add_argument("--warmup", type=int, default=10, help="optimizer steps before them")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--global-batch-size", type=int, default=32, help="documents in a step")
    parser.add_argument("--local-batch-size", type=int, default=2, help="documents in a forward pass")
    parser.add_argument("--folder", type=Path, help="where models lie meanwhile, up to 33 GB (default: temporary)")
    parser.add_argument("--results", type=Path, help="JSON lines: measurements are appended")
    parser.add_argument("--self-check", action="store_true", help="tiny shapes in this process, a CPU will do")
    args = parser.parse_args()
    if unknown := set(args.ways or ()) - {*ours(), *PEERS}:
        known = ", ".join(ours() + PEERS)
        parser.error(f"--ways: no program is called {', '.join(sorted(unknown))}: choose from {known}")
    if args.self_check:
        args.steps, args.warmup, args.seq_len, args.global_batch_size = 2, 1, 128, 4
    else:
        require_gpu()
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for case in args.cases:
            folder = (args.folder or Path(temporary)) / case
            folder.mkdir(parents=True, exist_ok=True)
            try:
                failed += run_case(case, folder, args)
            finally:
                shutil.rmtree(folder)
    if failed and args.self_check:
        raise SystemExit(f"the self-check failed: {'; '.join(failed)}")


def has_gpu() -> bool:
    """Whether torch sees a CUDA GPU."""
    import torch

    return torch.cuda.is_available()


def require_gpu() -> None:
    """Exit with one line where there is no CUDA GPU."""
    if not has_gpu():
        raise SystemExit("train_gpu.py needs a CUDA GPU; --self-check runs its code on a CPU")


def run_case(case: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """Measure every program on one case and print its table. Returns which failed."""
    name, method = CASES[case]
    fields = {**MODELS[name], **(TINY if args.self_check else {})}
    task = Task(
        model=str(folder / "model"),
        documents=str(folder / "documents.jsonl"),
        adapter=str(folder / "adapter") if method == "lora" else None,
        rank=16,
        alpha=32.0,
        batch_size=args.global_batch_size,
        local_batch_size=args.local_batch_size,
        steps=args.steps + args.warmup,
        warmup=args.warmup,
        lr=1e-4 if method == "lora" else 1e-5,
    )
    wanted = {"fields": fields, "method": method, "seq_len": args.seq_len}
    (folder / "task.json").write_text(json.dumps({"task": asdict(task), "make": wanted}))
    made = step(args, "benchmarks.mock", [str(folder / "task.json")])
    task.flops_per_step, peak = made.extra["flops_per_step"], made.extra["peak_flops"]
    (folder / "task.json").write_text(json.dumps(asdict(task)))
    found: dict[str, list[Measured]] = {}
    failed: dict[str, str] = {}
    for _ in range(args.rounds):
        for way in args.ways or ours() + [w for w in PEERS if installed(w)]:
            try:
                module = "benchmarks.ours" if way.startswith("dayzero") else "benchmarks.peers"
                one = step(args, module, [str(folder / "task.json"), way], apart="liger" in way)
            except (RuntimeError, ValueError, ImportError) as error:
                failed[way] = (str(error).strip().splitlines() or [type(error).__name__])[-1][:160]
                continue
            found.setdefault(way, []).append(one)
            if args.results:
                with open(args.results, "a") as file:
                    file.write(json.dumps({"case": case, **asdict(one)}) + "\n")
    print_table(case, task, found, failed, peak, made.extra["device"])
    return [f"{case}, {way}: {why}" for way, why in failed.items()]


def step(args: argparse.Namespace, module: str, arguments: list[str], apart: bool = False) -> Measured:
    """One measurement: in a new process; for the self-check in this one, unless it is to be `apart` (what Liger changes
    in a peer's model classes would stay for those that follow)."""
    if not args.self_check or (apart and has_gpu()):
        return measure(module, arguments)
    import importlib

    return importlib.import_module(module).called(arguments)


def ours() -> list[str]:
    """The engine's own settings that this version has."""
    from benchmarks.ours import GPU_WAYS

    return list(GPU_WAYS)


def installed(way: str) -> bool:
    """Whether a peer's packages can be imported."""
    return ("trl" not in way or find_spec("trl") is not None) and (
        "liger" not in way or find_spec("liger_kernel") is not None
    )


def print_table(
    case: str, task: Task, found: dict[str, list[Measured]], failed: dict[str, str], peak: float | None, device: str
) -> None:
    """Medians by program."""
    print(f"\n{case} on {device}, {task.flops_per_step / 1e12:.3g} TFLOP a step\n")
    print("| | tokens/s | TFLOP/s | MFU | GiB | last loss |\n|---|---:|---:|---:|---:|---:|")
    for way, measured in found.items():
        rate = median(m.rate(task.warmup) for m in measured)
        seconds = median(sum(m.step_seconds[task.warmup :]) for m in measured) / (task.steps - task.warmup)
        flops = task.flops_per_step / seconds
        mfu = f"{100 * flops / peak:.1f} %" if peak else ""
        memory = median(m.peak_gib for m in measured)
        print(f"| {way} | {rate:,.0f} | {flops / 1e12:.3g} | {mfu} | {memory:.1f} | {measured[0].losses[-1]:.4f} |")
    for way, why in failed.items():
        print(f"| {way} | failed: {why} | | | | |")


if __name__ == "__main__":
    main()
