"""The loss whose logits the tp ranks share out, against `F.cross_entropy` of whole logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from dayzero.engine.chunks import IGNORE
from dayzero.engine.loss import CausalLMWithLoss, LossOptions
from dayzero.engine.loss_choice import LOSSES
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import ARCHITECTURES

HEADS: dict[str, dict[str, Any]] = {
    "untied": {**ARCHITECTURES["qwen3"], "vocab_size": 127},  # the last rank has a row less
    "tied": ARCHITECTURES["llama"],
    "with bias": {**ARCHITECTURES["qwen3"], "model_type": "phi"},
    "fewer rows than ranks": {**ARCHITECTURES["qwen3"], "vocab_size": 3},  # four ranks: one has none
}


def split_vocabulary(job: dict[str, Any]) -> dict[str, Any]:
    """[found, expected] of each head and z-loss: the loss and all gradients of 1/7 of it, on this rank."""
    found: dict[str, Any] = {}
    for head, fields in HEADS.items():
        for z_loss in (0.0, 0.1):
            torch.manual_seed(0)
            kind = {k: v for k, v in fields.items() if k != "model_type"}
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields["model_type"], **kind)).eval()
            if (bias := model.get_output_embeddings().bias) is not None:
                torch.nn.init.normal_(bias)
            input_ids, labels = torch.randint(0, fields["vocab_size"], (2, 3, 17))
            labels[torch.rand(3, 17) < 0.6] = IGNORE
            positions = torch.arange(17).expand(3, 17)
            options = LossOptions(chunk_size=4, z_loss=z_loss, group=dist.group.WORLD)
            module = CausalLMWithLoss(model, loss=LOSSES["loss_parallel"], options=options).train()
            split = _with_gradients(model, module(input_ids, labels, positions))
            logits = model(input_ids=input_ids, position_ids=positions).logits[labels != IGNORE]
            loss = F.cross_entropy(logits, labels[labels != IGNORE], reduction="sum")
            whole = _with_gradients(model, loss + z_loss * logits.logsumexp(-1).square().sum())
            found[f"{head}, z-loss {z_loss:g}"] = [split, whole]
    return found


def _with_gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (loss / 7).backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def check_split_vocabulary(found: dict[str, Any]) -> None:
    assert len(found) == 2 * len(HEADS)
    for name, (split, whole) in found.items():
        assert len(whole) > 20
        torch.testing.assert_close(split.pop("loss"), whole.pop("loss"), rtol=1e-5, atol=0, msg=f"{name}: loss")
        torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
