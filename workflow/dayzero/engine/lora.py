"""LoRA adapters: put in by PEFT, kept in PEFT's own file format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dayzero.config import Lora
from dayzero.console import log
from dayzero.engine.expert_parallel import find_experts
from dayzero.errors import ConfigError, one_line

ADAPTER = "default"


def peft_config(config: Lora) -> LoraConfig:
    """PEFT's config with the same meaning."""
    targets = config.targets
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT only divides by it
        lora_dropout=config.dropout,
        target_modules=list(targets) if isinstance(targets, list) else targets,
        task_type="CAUSAL_LM",
        bias="none",
    )


def inject_lora(model: PreTrainedModel, config: Lora) -> None:
    """Put adapters into `model` in place and freeze all else. Before FSDP2: after it the ranks would diverge.

    Raises `ConfigError` when `targets`, or one name among them, match no module, naming those that would, and when
    PEFT cannot adapt what they match.
    """
    names = [name for name, _ in model.named_modules()]
    for target in config.targets if isinstance(config.targets, list) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise _no_match(model, target)
    try:
        inject_adapter_in_model(peft_config(config), model, adapter_name=ADAPTER)
    except ValueError as error:
        if "arget modules" in str(error):
            raise _no_match(model, config.targets) from error
        if config.dropout and find_experts(model):
            raise ConfigError(
                f"method.lora.dropout {config.dropout:g}: PEFT adapts fused experts without dropout only: set 0, or "
                "method.lora.targets that name no expert"
            ) from error
        raise ConfigError(f"method.lora.targets {config.targets!r}: {one_line(error)}") from error
    except re.error as error:
        raise ConfigError(f"method.lora.targets {config.targets!r} is no regular expression: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def warn_of_frozen_experts(model: nn.Module, config: Lora) -> None:
    """Say so where `targets` give a mixture's experts no adapters.

    They are fused tensors, not linear modules: PEFT reaches those of Mixtral and Qwen-MoE like models by the names of
    their former linears (https://github.com/huggingface/peft, transformers_weight_conversion.py), others not.
    """
    adapted = {id(m.get_base_layer()) for m in model.modules() if isinstance(m, ParamWrapper)}
    experts = find_experts(model).values()
    if frozen := sum(p.numel() for m in experts if id(m) not in adapted for p in m.parameters(recurse=False)):
        log.warning("method.lora.targets %r reach no expert: their %d parameters stay frozen", config.targets, frozen)


def _no_match(model: PreTrainedModel, targets: str | list[str]) -> ConfigError:
    names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    return ConfigError(
        f"method.lora.targets {targets!r} match no module: this model's linear modules are {', '.join(names)}"
    )


def save_adapter(directory: Path, config: Lora, state: Mapping[str, Tensor], base_model: str) -> None:
    """Write `state` (names of the model's own parameters) as a PEFT adapter directory.

    The format: `adapter_config.json` beside `adapter_model.safetensors`, whose names are the model's with the prefix
    `base_model.model.` and without the adapter's name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = peft_config(config)
    written.base_model_name_or_path = base_model
    written.inference_mode = True
    written.save_pretrained(str(directory))
    tensors = {
        "base_model.model." + name.replace(f".{ADAPTER}", ""): tensor.contiguous().cpu()
        for name, tensor in state.items()
        if "lora_" in name
    }
    assert tensors, "a LoRA model without adapter weights"
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
