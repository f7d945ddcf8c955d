"""LoRA in bf16 on a directory of bfloat16 weights: with and without float32 masters of what is frozen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from dayzero.engine import distributed
from dayzero.engine.gathering import float32_logits, whole_weights
from dayzero.engine.passes import training_logits
from dayzero.engine.structure import find_layers
from dayzero.engine.trainer import Trainer
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import ARCHITECTURES


def frozen(
    job: dict[str, Any], make: Callable[[dict[str, Any], Path], Trainer], fit: Callable[[dict[str, Any], Trainer], None]
) -> dict[str, Any]:
    """Losses, gradient norms, adapters and logits both ways, and which frozen weights were kept how."""
    folder = Path(job["folder"])
    directory = folder / "model"
    if distributed.rank() == 0:
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURES[job["model"]]))
        model.to(torch.bfloat16).save_pretrained(directory)
    distributed.barrier()
    job = {**job, "directory": str(directory), "train": {**job.get("train", {}), "precision": "bf16"}}
    found: dict[str, Any] = {}
    row, places = torch.arange(1, 33).unsqueeze(0), torch.arange(32).unsqueeze(0)
    for way in ("kept", "masters"):
        options = {} if way == "masters" else {"wraps": _real()}
        with patch("dayzero.engine.parallel_model.keep_frozen_in_bf16", **options):
            trainer = make(job, folder / way)
            fit(job, trainer)
            frozen_ones = [p for p in trainer.module.parameters() if not p.requires_grad]
            found[way] = {
                "losses": [r["loss"] for r in trainer.metrics.records],
                "grad_norms": [r["grad_norm"] for r in trainer.metrics.records],
                "weights": {name: tensor.clone() for name, tensor in whole_weights(trainer.model).items()},
                "bf16": training_logits(trainer.model, row, places),
                "float32": float32_logits(trainer.model, row, places),
                "again": training_logits(trainer.model, row, places),
                "kept_gathered": sum(not isinstance(p, DTensor) for p in _frozen_in_layers(trainer)),
                "dtypes": sorted({str(p.dtype) for p in frozen_ones}),
                "sharded": sum(isinstance(p, DTensor) for p in frozen_ones) / len(frozen_ones),
            }
    return found


def _frozen_in_layers(trainer: Trainer) -> list[torch.nn.Parameter]:
    layers = find_layers(trainer.module.model)
    return [p for layer in layers for p in layer.parameters() if not p.requires_grad]


def _real() -> Callable[..., None]:
    from dayzero.engine.frozen import keep_frozen_in_bf16

    return keep_frozen_in_bf16


def check_frozen(results: dict[str, dict[str, Any]], expected: dict[str, float]) -> None:
    """`expected`: part of a job's name -> share of the frozen parameters that are sharded."""
    found = {name: got for name, got in results.items() if name.startswith("frozen")}
    assert len(found) == len(expected)
    for name, got in found.items():
        kept, masters = got["kept"], got["masters"]
        assert kept["dtypes"] == ["torch.bfloat16"]
        assert masters["dtypes"] == ["torch.float32"]
        assert kept["sharded"] == next(share for part, share in expected.items() if part in name)
        assert masters["kept_gathered"] == 0, name  # a second copy of the model
        for key in ("losses", "grad_norms"):
            assert kept[key] == masters[key], (name, key)  # the same numbers, so the same to the bit
        assert kept["losses"][-1] < kept["losses"][0]
        assert all(torch.equal(kept["weights"][n], tensor) for n, tensor in masters["weights"].items())
        assert torch.equal(kept["bf16"], masters["bf16"])
        assert torch.equal(kept["again"], kept["bf16"])
        size = masters["float32"].abs().max()
        assert (kept["float32"] - masters["float32"]).abs().max() <= 1e-6 * size
        assert (kept["float32"] - kept["bf16"]).abs().max() > 1e-4 * size
