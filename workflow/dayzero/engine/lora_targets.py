"""Where adapters go when nobody names their places: `all-linear` in models that need a second look.

PEFT's own `all-linear` is kept wherever it is right. It is not where PEFT refuses some of the modules, where the model
reads a linear's weight without calling the module, so that an adapter on it would do nothing, and where experts are
fused tensors that PEFT does not know.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dayzero.config import Lora, Method
from dayzero.engine.expert_parallel import find_experts


class ResolvedLora(Lora):
    """LoRA's settings with `targets` as this model has them."""

    target_parameters: list[str] = []
    """Full names of fused experts' matrices to adapt beside `targets`."""


def resolve_targets(model: PreTrainedModel, method: Method) -> Method:
    """`method` with the targets that `all-linear` stands for in `model`, which is on the meta device and not changed."""
    if method.name != "lora" or method.lora.targets != "all-linear":
        return method
    linears = _linears(model)
    kept = linears - left_out(model)
    found: dict[str, Any] = {}
    if kept and kept != linears:
        found["targets"] = sorted(kept)
    # PEFT adapts fused tensors without dropout and without DoRA only
    if find_experts(model) and not method.lora.dropout and not method.lora.dora:
        found["target_parameters"] = _unreached_experts(model, found.get("targets", "all-linear"))
    if not any(found.values()):
        return method
    return method.model_copy(update={"lora": ResolvedLora(**{**method.lora.model_dump(), **found})})


def left_out(model: PreTrainedModel) -> set[str]:
    """Names of linear modules, the LM head apart, on which an adapter would be refused or would do nothing.

    PEFT refuses modules whose weights a fused kernel reads past the module's forward call (the output projections of
    Mamba layers, https://github.com/huggingface/peft/issues/2274). It is asked, by the last part of the name, on a bare
    chain of modules around one of each. Which modules are called at all a forward pass on the meta device tells, where
    the model can do one there.
    """
    linears = _linears(model)
    one_of_each = {name.rpartition(".")[2]: name for name in linears}
    refused = {last for last, name in one_of_each.items() if not _accepted(model, name)}
    called = _called(model)
    return {n for n in linears if n.rpartition(".")[2] in refused or (called is not None and n not in called)}


def not_adapted(model: PreTrainedModel, method: Method) -> list[str]:
    """Last parts of the names of the linear modules that the `method` of `resolve_targets` leaves out."""
    if not isinstance(method.lora, ResolvedLora) or not isinstance(method.lora.targets, list):
        return []
    return sorted({name.rpartition(".")[2] for name in _linears(model) - set(method.lora.targets)})


def share_tied_adapters(model: nn.Module) -> None:
    """Give adapted modules whose base weights are one tensor one adapter, so that the merged weight is one too."""
    first: dict[int, LoraLayer] = {}
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        weight = getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight"), None)
        owner = first.setdefault(id(weight), module)
        if owner is not module and weight is not None:
            for part in module.adapter_layer_names:
                if hasattr(module, part):
                    setattr(module, part, getattr(owner, part))


def _linears(model: PreTrainedModel) -> set[str]:
    head = model.get_output_embeddings()
    return {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}


def _accepted(model: PreTrainedModel, name: str) -> bool:
    around = chain = nn.Module()
    around.config = model.config
    *path, last = name.split(".")
    for part in path:
        inner = nn.Module()
        chain.add_module(part, inner)
        chain = inner
    chain.add_module(last, copy.deepcopy(model.get_submodule(name)))  # PEFT freezes what it adapts
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of all that the bare chain lacks
            inject_adapter_in_model(LoraConfig(target_modules=[name]), around)
    except ValueError:
        return False
    return True


def _called(model: PreTrainedModel) -> set[str] | None:
    """Names of the modules that a forward pass calls; None where none can be done without values."""
    called: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=model.device), use_cache=False)
    except Exception:  # control flow that depends on values, an operator without a meta kernel
        return None
    finally:
        for handle in handles:
            handle.remove()
    return called


def _unreached_experts(model: PreTrainedModel, targets: str | list[str]) -> list[str]:
    """Full names of the matrices of fused experts to which adapters on `targets` do not reach."""
    trial = copy.deepcopy(model)
    with torch.device("meta"):
        inject_adapter_in_model(LoraConfig(target_modules=targets), trial)
    reached = {n for n, m in trial.named_modules() if isinstance(m, ParamWrapper)}
    return [
        f"{name}.{parameter_name}"
        for name, module in find_experts(model).items()
        if name not in reached
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]
