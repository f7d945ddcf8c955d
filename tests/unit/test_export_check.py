"""The check of an export against training in bf16 lets rounding pass and a lost adapter not."""

from __future__ import annotations

import torch
from dayzero.config import Lora, Method
from dayzero.engine.export import logits_of, training_difference
from dayzero.engine.model import ModelSource, build_model

from tests.tiny import ARCHITECTURES, VOCAB_SIZE

INPUT = torch.arange(1, 33).unsqueeze(0) % VOCAB_SIZE


def test_rounding_passes_and_a_lost_adapter_does_not() -> None:
    source = ModelSource(directory=None, architecture=ARCHITECTURES["qwen3"])
    base = build_model(source, source.config(), Method(name="full"), seed=0, meta=False).eval()
    lora = Method(name="lora", lora=Lora(rank=4))
    adapted = build_model(source, source.config(), lora, seed=0, meta=False).eval()
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        in_training = logits_of(adapted, INPUT)
    kept = training_difference(adapted, INPUT, in_training, "bf16")
    lost = training_difference(base, INPUT, in_training, "bf16")
    assert 0 < kept["difference"] <= kept["tolerance"]
    assert lost["difference"] > 3 * lost["tolerance"]
