"""Where adapters go when nobody names their places: `all-linear` in models that need a second look.

PEFT's own `all-linear` is kept wherever it is right. It is not where PEFT refuses some of the modules, where the model
reads a linear's weight without calling the module, so that an adapter on it would do nothing, and where experts are
fused tensors that PEFT does not know.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dayzero.config import Lora, Method
from dayzero.engine.derived_plan import wildcard
from dayzero.engine.expert_parallel import find_experts
from dayzero.engine.tiny_copy import TOKENS, tiny_copy


class ResolvedLora(Lora):
    """LoRA's settings with `targets` as this model has them."""

    target_parameters: tuple[str, ...] = ()
    """Full names of fused experts' matrices to adapt beside `targets`."""


def resolve_targets(model: PreTrainedModel, method: Method) -> Method:
    """`method` with the targets that `all-linear` stands for in `model`, on the meta device, which is not changed.

    PEFT refuses modules whose weights a fused kernel reads past the module's forward call (the output projections of
    Mamba layers, https://github.com/huggingface/peft/issues/2274); it is asked about each name then. Which modules are
    called at all a tiny copy of the model tells, where one can be made. Routers that are linear but
    give more than the product (scores and indices) are left out too.
    """
    if "lora" not in method.name or method.lora.targets != "all-linear":
        return method
    linears, never_called, trial = _linears(model), _never_called(model), _adapted(model, "all-linear")
    kept = {n for n in linears if wildcard(n) not in never_called and _is_plain(model.get_submodule(n))}
    one_of_each = {name.rpartition(".")[2]: name for name in linears}
    refused: set[str] = set()
    # PEFT adapts fused tensors without dropout and without DoRA only
    adapts_experts = not (method.lora.dropout or method.lora.dora)
    must_spare = not adapts_experts and trial is not None and bool(_adapted_experts(trial))
    if trial is None:
        refused = {last for last, name in one_of_each.items() if not _accepted(model, name)}
    elif must_spare:
        refused = {last for last, name in one_of_each.items() if _means_experts(model, name)}
    kept = {name for name in kept if name.rpartition(".")[2] not in refused}
    found: dict[str, Any] = {}
    if kept and (kept != linears or must_spare):
        found["targets"] = sorted(kept)
        trial = _adapted(model, found["targets"])
    if trial is not None and adapts_experts:
        found["target_parameters"] = _unreached_experts(model, trial)
    if not any(found.values()):
        return method
    return method.model_copy(update={"lora": ResolvedLora(**{**method.lora.model_dump(), **found})})


def not_adapted(model: PreTrainedModel, method: Method) -> list[str]:
    """Last parts of the names of the linear modules that the `method` of `resolve_targets` leaves out."""
    if not isinstance(method.lora, ResolvedLora) or not isinstance(method.lora.targets, list):
        return []
    return sorted({name.rpartition(".")[2] for name in _linears(model) - set(method.lora.targets)})


def half_adapted(model: nn.Module) -> tuple[str, str, str] | None:
    """An adapted module whose weight is also another's that has no adapter of its kind: (its name, the other's, the
    first of all that have the weight)."""
    holders: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].append((name.removesuffix(".base_layer"), module))
    kinds = {id(m.get_base_layer()): type(m) for m in model.modules() if isinstance(m, LoraLayer)}
    for shared in holders.values():
        if len({kinds.get(id(module)) for _, module in shared}) > 1:
            adapted = next(name for name, module in shared if id(module) in kinds)
            other = next(name for name, _ in shared if name != adapted)
            return adapted, other, shared[0][0]
    return None


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


def _is_plain(linear: nn.Module) -> bool:
    """Whether what `linear` gives is a product, to which an adapter can add its own."""
    if type(linear) in (nn.Linear, Conv1D):
        return True
    size = getattr(linear, "in_features", None)
    if size is None:
        return True
    try:
        with torch.no_grad():
            given = linear(torch.empty(1, size, device="meta"))
    except Exception:  # it takes something else
        return True
    return isinstance(given, Tensor)


def _accepted(model: PreTrainedModel, name: str) -> bool:
    around = chain = nn.Module()
    around.config = model.config  # type: ignore[assignment]  # PEFT looks for it
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


def _never_called(model: PreTrainedModel) -> set[str]:
    """Names, with `*` for layers' numbers, of linear modules that a tiny copy of `model` has and calls in no layer."""
    small = tiny_copy(model)
    if small is None:
        return set()
    called: set[str] = set()
    linears = _linears(small)
    for name in linears:
        small.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(wildcard(name)))
    with torch.no_grad():
        small(input_ids=TOKENS, use_cache=False)
    return {wildcard(name) for name in linears} - called


def _adapted(model: PreTrainedModel, targets: str | list[str]) -> PreTrainedModel | None:
    """A copy of `model` with adapters; None where PEFT refuses one of them."""
    trial = copy.deepcopy(model)
    try:
        with torch.device("meta"):
            inject_adapter_in_model(LoraConfig(target_modules=targets), trial)
    except ValueError:
        return None
    return trial


def _means_experts(model: PreTrainedModel, name: str) -> bool:
    """Whether PEFT takes the name of a linear for that of the linears that experts once were."""
    trial = _adapted(model, [name])
    return trial is None or bool(_adapted_experts(trial))


def _adapted_experts(trial: PreTrainedModel) -> set[str]:
    return {name for name, module in trial.named_modules() if isinstance(module, ParamWrapper)}


def _unreached_experts(model: PreTrainedModel, trial: PreTrainedModel) -> tuple[str, ...]:
    """Full names of the matrices of fused experts that have no adapters in `trial`, the copy with adapters."""
    reached = _adapted_experts(trial)
    return tuple(
        f"{name}.{parameter_name}"
        for name, module in find_experts(model).items()
        if name not in reached
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    )
