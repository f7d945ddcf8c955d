"""What is where in a model, discovered from its modules: no class names, no per-model tables."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that turns token ids into hidden states: the outermost inner PreTrainedModel with the layers.

    `base_model_prefix` is not used: it is wrong for some architectures.
    Raises `ValueError` when the model has no such module.
    """
    layers = find_layers(model)
    for module in model.modules():
        if module is not model and isinstance(module, PreTrainedModel) and any(m is layers for m in module.modules()):
            return module
    raise ValueError(f"{type(model).__name__} has no decoder module around its layers: use train.loss: cross_entropy")


def find_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers: the longest ModuleList that is not inside another one.

    Raises `ValueError` when there is none.
    """
    best: nn.ModuleList | None = None
    pending: list[nn.Module] = [model]
    while pending:
        for child in pending.pop(0).children():
            if not isinstance(child, nn.ModuleList):
                pending.append(child)
            elif best is None or len(child) > len(best):
                best = child
    if best is None:
        raise ValueError(f"{type(model).__name__} has no list of layers: this architecture is not supported")
    return best
