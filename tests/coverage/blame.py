"""Whose failure is it? The same step by the library alone, without any of this project's code."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from tests.coverage.checks import Subject, explain, sum_of_losses


def blame(check: str, subject: Subject) -> str:
    """What goes wrong in transformers' or PEFT's own use of the model, in one line; empty where nothing does."""
    try:
        if check in ("export", "merge"):
            return _reload(subject)
        if check == "checkpointing":
            return _checkpointing(subject)
        if check == "bf16":
            return _bf16(subject)
        sum_of_losses(subject.plain(), subject.documents).backward()
    except Exception as error:
        return f"transformers alone: {explain(error)}"
    return ""


def _reload(subject: Subject) -> str:
    model = subject.plain().eval()
    again = subject.folder / "again"
    model.save_pretrained(again)
    loaded, info = AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    tokens = subject.documents[0].unsqueeze(0)
    with torch.no_grad():
        want, got = (m(input_ids=tokens, use_cache=False).logits for m in (model, loaded.eval()))
    off = ((want - got).abs().max() / want.abs().max()).item()
    if missing or not off <= 1e-5:
        return f"transformers alone: save_pretrained and from_pretrained give logits off by {off:.2g} {missing[:2]}"
    return ""


def _checkpointing(subject: Subject) -> str:
    model = subject.plain()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    sum_of_losses(model, subject.documents).backward()
    return ""


def _bf16(subject: Subject) -> str:
    model = AutoModelForCausalLM.from_pretrained(subject.directory, dtype=torch.bfloat16).train()
    sum_of_losses(model, subject.documents).backward()
    return ""
