"""From what training left behind to a plain Hugging Face model, and the proof that nothing was lost on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dayzero.config import Method
from dayzero.engine.model import ModelSource, build_model
from dayzero.errors import ConfigError

TOLERANCE = 1e-5
"""Largest difference of logits that must be equal, as a share of the largest logit."""


def trained_model(
    source: ModelSource, tokenizer: Path | None, method: Method, seed: int, train: Path | None
) -> PreTrainedModel:
    """The whole trained model in float32 on the CPU, adapters merged; the untouched one where `train` is None.

    `train` is the train stage's folder, with `adapter/` for LoRA and its last checkpoint for other methods.
    """
    plain = Method(name="none")
    if train is not None and not (train / "summary.json").is_file():
        raise ConfigError(f"--train {train} has no summary.json: finish the train stage first")
    config = source.config(tokenizer)
    model = build_model(source, config, plain, seed, meta=False).eval()
    if train is None:
        return model
    if method.name == "lora":
        return PeftModel.from_pretrained(model, str(train / "adapter")).merge_and_unload()
    _load_trained(model, train)
    return model


def _load_trained(model: PreTrainedModel, train: Path) -> None:
    from dayzero.files import read_json

    checkpoint = train / read_json(train / "summary.json")["checkpoint"]
    state: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    saved = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    wanted = {f"model.{name}" for name in state if f"model.{name}" in saved}
    missing = {f"model.model.{name}" for name, p in model.named_parameters() if p.requires_grad} - wanted
    if missing:
        raise ValueError(f"{checkpoint} lacks {', '.join(sorted(missing)[:3])}: it is a checkpoint of another model")
    dcp.load({"model": {name: state[name] for name in state if f"model.{name}" in wanted}}, checkpoint_id=checkpoint)
    model.tie_weights()


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the parameters alone: `model.to` would round buffers too, such as rotary frequencies."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """[B, T] -> [B, T, V], float32."""
    return model(input_ids=input_ids, use_cache=False).logits.float()


def largest_difference(logits: Tensor, reference: Tensor) -> float:
    """Largest absolute difference as a share of the reference's largest absolute value (at least 1)."""
    return ((logits - reference).abs().max() / reference.abs().max().clamp(min=1.0)).item()


def reload(directory: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The exported directory as any user loads it, in float32.

    Raises `ValueError` when a weight is missing, left over, empty or carries a wrapper's prefix.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    model, info = loaded
    wrong = {
        kind: sorted(info[kind])[:3] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]
    }
    empty = [name for name, tensor in model.state_dict().items() if tensor.numel() == 0]
    if wrong or empty:
        raise ValueError(
            f"{directory} does not reload: {wrong or ''} {'empty: ' + ', '.join(empty[:3]) if empty else ''}"
        )
    return model.eval()
