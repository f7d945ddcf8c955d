"""Loading a directory into a mesh: the values against from_pretrained, and the memory that it takes.

How memory is measured: the kernel's high-water mark of the process's resident memory (VmHWM, set back to the present
one through /proc/self/clear_refs) minus what was resident before. It sees everything (shards, buffers, copies, pages of
mapped files), and malloc is told to return what is freed, so that nothing freed earlier is used again unseen. The model
measured is large beside an interpreter's own noise, and small ones are loaded first: nothing is imported meanwhile.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import torch
from dayzero.engine import distributed
from dayzero.engine.weights import Weights
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import ARCHITECTURES

MODELS: dict[str, dict[str, Any]] = {
    **{name: {**ARCHITECTURES[name], "vocab_size": 130} for name in ("llama", "qwen3")},  # 130 rows: uneven shards
    "mixtral": {
        **ARCHITECTURES["llama"], "model_type": "mixtral", "num_local_experts": 4, "tie_word_embeddings": False,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 130, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "big": {
        **ARCHITECTURES["qwen3"], "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 8, "num_attention_heads": 8, "head_dim": 64,
    },
}  # fmt: skip
"""A tied head; norms of queries and keys; experts that are stored one by one and fused; transposed linears and a
prefix that the files lack; one of 32 million parameters (130 MB), of which the largest has 17 MB."""


def write_models(folder: Path) -> None:
    """Each of MODELS as a Hugging Face directory in several files, half of them in bfloat16."""
    for number, (name, fields) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        dtype = torch.bfloat16 if name in ("llama", "mixtral") else torch.float32
        model.to(dtype).save_pretrained(folder / name, max_shard_size="30MB" if name == "big" else "40KB")


def loading_jobs(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Loads of each model into meshes of 2 or 4 ranks, and, last, those that are measured."""
    from tests.distributed.cases import job

    def load_job(model: str, method: str = "full", *, strategy: str = "fsdp2", **sizes: Any) -> dict[str, Any]:
        made = job("load", model, method, "padded", folder, strategy=strategy, **sizes)
        return {**made, "directory": str(folder / "models" / model)}

    write_models(folder / "models")
    jobs = [load_job("llama"), load_job("qwen3", "lora", tp=2), load_job("mixtral")]
    if ranks == 2:
        jobs += [load_job("gpt2"), load_job("llama", strategy="ddp", dp_replicate=2), load_job("llama", pp=2)]
    else:
        jobs += [load_job("gpt2", dp_replicate=2), load_job("llama", tp=2), load_job("qwen3", pp=2)]
    return [*jobs, load_job("big"), load_job("big", tp=2)]


def check_loading(results: dict[str, dict[str, Any]]) -> None:
    """Every value as transformers loads it, and no more memory than the shard, one tensor and 10 %."""
    found = {name: got for name, got in results.items() if name.startswith("load-")}
    assert len(found) == 8
    for name, got in found.items():
        assert not got["differ"], name
        for rank in got["memory"] if "big" in name else ():
            assert rank["shard"] <= rank["peak"], (name, rank)  # else something was not seen
            assert rank["peak"] <= 1.1 * (rank["shard"] + rank["largest"]), (name, rank)


def resident(field: str) -> int:
    """Bytes in a field of /proc/self/status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def load(job: dict[str, Any]) -> dict[str, Any]:
    """Load `job["directory"]` as the trainer does; what differs from transformers' own, and the bytes it took."""
    from tests.distributed.trainers import all_weights, make_trainer

    real, measured = Weights.load, {}
    malloc = ctypes.CDLL(None)
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        malloc.mallopt(option, 65536)

    def measure(self: Weights, *arguments: Any, **options: Any) -> None:
        gc.collect()
        malloc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        real(self, *arguments, **options)
        measured["peak"] = resident("VmHWM") - before

    Weights.load = measure  # type: ignore[method-assign]
    try:
        trainer = make_trainer(job, Path(job["folder"]))
    finally:
        Weights.load = real  # type: ignore[method-assign]
    parameters = list(trainer.module.parameters())
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    measured["shard"] = sum(p.numel() * p.element_size() for p in local)
    measured["largest"] = max(p.numel() * p.element_size() for p in parameters)
    every: list[dict[str, int]] = [{} for _ in range(distributed.world_size())]
    torch.distributed.all_gather_object(every, measured)
    got = all_weights(trainer)
    got |= {name.removeprefix("module.").removeprefix("model."): b for name, b in trainer.module.named_buffers()}
    got = {name.replace(".base_layer.", "."): value for name, value in got.items()}
    want = AutoModelForCausalLM.from_pretrained(job["directory"], dtype=torch.float32)
    values = {**want.state_dict(), **dict(want.named_buffers())}
    return {"memory": every, "differ": [n for n in values if n not in got or not torch.equal(got[n], values[n])]}
