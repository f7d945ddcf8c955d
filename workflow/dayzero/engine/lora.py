"""LoRA adapters: put in by PEFT, kept in PEFT's own file format."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dayzero.config import Lora
from dayzero.console import log
from dayzero.engine.expert_parallel import find_experts
from dayzero.engine.lora_targets import half_adapted, share_tied_adapters
from dayzero.errors import ConfigError, one_line

ADAPTER = "default"
MAGNITUDE = "lora_magnitude_vector"
"""DoRA's part of an adapted module: the lengths of its weight's rows."""


def is_adapter(name: str) -> bool:
    """Whether the parameter or module of that name is PEFT's own and not the model's."""
    return "lora_" in name


def peft_config(config: Lora) -> LoraConfig:
    """PEFT's config of the adapters with the same meaning; modules trained whole are not in it."""
    targets = config.targets
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT only divides by it
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=list(targets) if isinstance(targets, list) else targets,
        target_parameters=list(getattr(config, "target_parameters", ())) or None,
        task_type="CAUSAL_LM",
        bias="none",
    )


def inject_lora(model: PreTrainedModel, config: Lora) -> None:
    """Put adapters into `model` in place, freeze all else. Before FSDP2: after it the ranks would diverge.

    `modules_to_save` are trained in place: PEFT's second copy of them is not needed where nothing unloads the adapter.
    Raises `ConfigError` when `targets`, or one name among them, match no module, naming those that would, and when
    PEFT cannot adapt what they match, or it is tied to what has no such adapter; also when `modules_to_save` cannot be
    trained.
    """
    _check_modules_to_save(model, config)
    names = [name for name, _ in model.named_modules()]
    for target in config.targets if isinstance(config.targets, list) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise _no_match(model, target)
    try:
        inject_adapter_in_model(peft_config(config), model, adapter_name=ADAPTER)
    except ValueError as error:
        if "arget modules" in str(error):
            raise _no_match(model, config.targets, "match no module" + _how_to_write(model, config)) from error
        if config.dora and find_experts(model):
            raise ConfigError(
                "method.lora.dora: PEFT adapts fused experts without DoRA only: turn it off, or set "
                "method.lora.targets that name no expert"
            ) from error
        if config.dropout and find_experts(model):
            raise ConfigError(
                f"method.lora.dropout {config.dropout:g}: PEFT adapts fused experts without dropout only: set 0, or "
                "method.lora.targets that name no expert"
            ) from error
        if unadaptable := re.match(r"Target module (\w+)", str(error)):
            raise _no_match(model, config.targets, f"match a {unadaptable[1]}, which PEFT cannot adapt") from error
        raise ConfigError(f"method.lora.targets {config.targets!r}: {one_line(error)}") from error
    except re.error as error:
        raise ConfigError(f"method.lora.targets {config.targets!r} is no regular expression: {error}") from error
    if tied := half_adapted(model):
        adapted, other, first = (name.rpartition(".")[2] for name in tied)
        raise ConfigError(
            f"method.lora.targets {config.targets!r}: the model ties {adapted} to {other}, which its adapter would "
            f"change in the export but not in training: leave {adapted} out, or train both whole by "
            f"method.lora.modules_to_save: [{first}]"
        )
    share_tied_adapters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    for name, module in model.named_modules():
        if _is_named(name, config.modules_to_save):
            if any(is_adapter(inner) for inner, _ in module.named_parameters()):
                raise ConfigError(
                    f"method.lora.modules_to_save: {name} is trained whole, so method.lora.targets "
                    f"{config.targets!r} cannot adapt it too: leave it out of one of them"
                )
            module.requires_grad_(True)


def warn_of_frozen_experts(model: nn.Module, config: Lora) -> None:
    """Say so where `targets` give a mixture's experts no adapters.

    They are fused tensors, not linear modules: PEFT reaches those of Mixtral and Qwen-MoE like models by the names of
    their former linears (https://github.com/huggingface/peft, transformers_weight_conversion.py), others not.
    """
    adapted = {id(m.get_base_layer()) for m in model.modules() if isinstance(m, ParamWrapper)}
    experts = find_experts(model).values()
    if frozen := sum(p.numel() for m in experts if id(m) not in adapted for p in m.parameters(recurse=False)):
        log.warning("method.lora.targets %r reach no expert: their %d parameters stay frozen", config.targets, frozen)


def trained_whole(names: Iterable[str], config: Lora) -> set[str]:
    """Those of the parameters `names` that belong to `modules_to_save`."""
    return {n for n in names if any(f".{m}." in f".{n}" for m in config.modules_to_save) and not is_adapter(n)}


def _is_named(name: str, ends: Iterable[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _check_modules_to_save(model: PreTrainedModel, config: Lora) -> None:
    modules = {name: module for name, module in model.named_modules() if name}
    weights = dict(model.named_parameters(remove_duplicate=False))
    for end in config.modules_to_save:
        named = [name for name in modules if _is_named(name, [end])]
        if not any(True for name in named for _ in modules[name].parameters()):
            ends = {
                name.rpartition(".")[2] for name, module in modules.items() if any(True for _ in module.parameters())
            }
            big = [n.rpartition(".")[2] for n, m in modules.items() if m in _ends_of(model)]
            near = difflib.get_close_matches(end, sorted(ends), n=2)
            raise ConfigError(
                f"method.lora.modules_to_save {end!r} matches no module with weights: this model's embedding and head "
                f"are {', '.join(big)}" + (f"; the nearest names are {', '.join(near)}" if near else "")
            )
        tied = model.all_tied_weights_keys
        for name in named:
            inside = [n for n in weights if n.startswith(f"{name}.")]
            if other := next((tied[n] for n in inside if n in tied and weights[n] is weights[tied[n]]), None):
                raise ConfigError(
                    f"method.lora.modules_to_save {end!r}: its weight is {other}, to which the model ties it: name "
                    f"{other.split('.')[-2]} instead, then both are trained"
                )


def _ends_of(model: PreTrainedModel) -> list[nn.Module]:
    found = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [module for module in found if module is not None]


def _no_match(model: PreTrainedModel, targets: str | list[str], fault: str = "match no module") -> ConfigError:
    linears = ", ".join(_linear_names(model))
    return ConfigError(f"method.lora.targets {targets!r} {fault}: this model's linear modules are {linears}")


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of linear modules that are tied to none."""
    holders = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    linears = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D))
    return sorted({name.rpartition(".")[2] for name, m in linears if holders[id(m.weight)] == 1})


def _how_to_write(model: PreTrainedModel, config: Lora) -> str:
    """What somebody may have meant by `targets` that are a text, one regular expression over whole names."""
    if isinstance(config.targets, list):
        return ""
    if difflib.get_close_matches(config.targets, ["all-linear"]):
        return " (did you mean all-linear?)"
    named = config.targets in _linear_names(model)
    name = f": for the modules of that name write [{config.targets}]" if named else ""
    return f" (a text is one regular expression over whole names{name})"


def stored_name(name: str) -> str:
    """The name of a trained parameter in PEFT's files: with a prefix, without the adapter's name."""
    name = name.replace(f".{MAGNITUDE}.{ADAPTER}.weight", f".{MAGNITUDE}")
    return "base_model.model." + name.replace(f".{ADAPTER}", "")


def save_adapter(
    directory: Path, config: Lora, state: Mapping[str, Tensor], base_model: str, tied: Mapping[str, str] | None = None
) -> None:
    """Write `state` (names of the model's own parameters) as a PEFT adapter directory.

    `tied`: name of a tied tensor -> the tensor that it is. PEFT wants both, and to be told to tie them again.

    The format: `adapter_config.json` beside `adapter_model.safetensors`, whose names are those of `stored_name`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tied = tied or {}
    state = {**state, **{name: state[of] for name, of in tied.items() if of in state}}
    whole = trained_whole(state, config)
    whole |= {name for name, of in tied.items() if of in whole}
    written = peft_config(config)
    if config.modules_to_save:
        written.modules_to_save = list(config.modules_to_save)
        written.ensure_weight_tying = bool(tied)
    written.base_model_name_or_path = base_model
    written.inference_mode = True
    written.save_pretrained(str(directory))
    tensors = {
        stored_name(name): tensor.clone(memory_format=torch.contiguous_format).cpu()
        for name, tensor in state.items()
        if is_adapter(name) or name in whole
    }
    assert tensors, "a LoRA model without adapter weights"
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
