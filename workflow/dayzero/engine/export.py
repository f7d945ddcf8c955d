"""The proof that nothing was lost between training and a plain Hugging Face directory, without a whole model in memory.

Both checks compare logits in float32: what is exported against training, and the written directory against what was
meant to be in it. A model is run a decoder layer at a time: a layer has its weights only while it computes.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dayzero.config import Method
from dayzero.console import log
from dayzero.engine.difference import relative_difference
from dayzero.engine.model import ModelSource
from dayzero.engine.structure import find_layers
from dayzero.engine.weights import Weights
from dayzero.errors import ConfigError
from dayzero.memory import available_memory

TOLERANCE = 1e-5
"""Largest difference of logits that must be equal, as a share of the largest logit."""

OWN_ROUNDING = 10
"""Times the model's own rounding that its logits may differ besides: merged weights are rounded once more, and a GPU
sums in another order. SmolLM2-135M with LoRA of rank 64 was 1 to 3 times as far off, 7e-6."""

WIDEST = 1e-4
"""Largest difference that any rounding excuses: what moves further chooses, as a router of experts does, between two
that are all but equal, and would excuse anything."""

DRAWS = 8
"""Times at most that the weights are moved: an even choice falls the other way in a quarter to a half of them."""

ROOM = 0.5
"""Share of the free memory that a model may take to be loaded whole by transformers when a directory is checked."""


@torch.no_grad()
def logits_of(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """[B, T] -> [B, T, V], float32."""
    return model(input_ids=input_ids, use_cache=False).logits.float()


def streamed_logits(
    model: PreTrainedModel, read: Callable[[str], Tensor], input_ids: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[B, T] -> [B, T, V], float32, of the meta-device `model` with the values that `read` gives by name.

    Parameters are rounded to `dtype`, as a file of that dtype would do.
    What is outside the decoder's layers, embeddings and head, stays in memory; of the layers only the one that runs.
    """
    model = copy.deepcopy(model).eval()
    layers = list(find_layers(model))
    inside = {id(module) for layer in layers for module in layer.modules()}
    paths = {id(module): f"{path}." if path else "" for path, module in model.named_modules()}
    values: dict[int, nn.Parameter] = {}
    """id of a parameter that has memory now, when it was empty -> the parameter; a tied one is in several modules."""
    empty = {(id(m), name): p for m in model.modules() for name, p in m._parameters.items()}

    def fill(module: nn.Module) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in values:
                    value = read(paths[id(module)] + name).to(dtype).float()
                    values[id(parameter)] = nn.Parameter(value, requires_grad=False)
                module._parameters[name] = values[id(parameter)]

    def fill_layer(layer: nn.Module, *_: Any) -> None:
        for module in layer.modules():
            fill(module)

    def empty_layer(layer: nn.Module, *_: Any) -> None:
        for module in layer.modules():
            for name in module._parameters:
                module._parameters[name] = empty[id(module), name]
        for key in set(values) - kept:
            del values[key]

    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = read(paths[id(module)] + name)
        if id(module) not in inside:
            fill(module)
    kept = set(values)
    for layer in layers:
        layer.register_forward_pre_hook(fill_layer)
        layer.register_forward_hook(empty_layer)
    return logits_of(model, input_ids)


@dataclass(frozen=True)
class Comparison:
    """How far logits are from those of training, how far they may be, and of how many tokens that is said."""

    difference: float
    tolerance: float
    tokens: int


def compare_with_training(
    model: PreTrainedModel, read: Callable[[str], Tensor], input_ids: Tensor, logits: Tensor, trained: Tensor
) -> Comparison:
    """Compare `logits`, which `streamed_logits` gave for the same model, with those of training, both [B, T, V].

    Where they are not equal the model's own rounding says how far apart they may be. Tokens whose logits rounding alone
    moves past `WIDEST` say nothing and are left out. Raises `ConfigError` when those are more than half.
    """
    difference, tokens = logit_difference(logits, trained), input_ids.shape[1]
    if difference <= TOLERANCE or difference == float("inf"):
        return Comparison(difference, TOLERANCE, tokens)
    rounding = torch.zeros(tokens)
    for seed in range(DRAWS):
        rounding = rounding.maximum(own_rounding(model, read, input_ids, logits, seed))
        settled = rounding <= WIDEST
        left = int(settled.sum())
        if 2 * left < tokens:
            raise ConfigError(
                f"nothing is exported: rounding alone moves the logits of {tokens - left} of {tokens} tokens by more "
                f"than {WIDEST:g} of their size, as where a router's experts are all but equal, so that this model "
                "cannot be told from a damaged one: keep --train and train it further (train.max_steps)"
            )
        tolerance = min(max(TOLERANCE, OWN_ROUNDING * float(rounding[settled].max())), WIDEST)
        found = Comparison(logit_difference(logits[:, settled], trained[:, settled]), tolerance, left)
        if found.difference <= found.tolerance:
            break
    log.info("logits differ by %.2g; rounding of this model's weights moves them by %.2g", difference, rounding.max())
    if left < tokens:
        log.info("not compared: %d of %d tokens, which rounding moves by more than %g", tokens - left, tokens, WIDEST)
    return found


def own_rounding(
    model: PreTrainedModel, read: Callable[[str], Tensor], input_ids: Tensor, logits: Tensor, seed: int = 0
) -> Tensor:
    """[T]: how far a token's `logits`, which `streamed_logits` gave, move when each weight does by up to a unit in its
    last place, drawn from `seed`, as a share of the largest logit (at least 1)."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.finfo(torch.float32).eps
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def moved(name: str) -> Tensor:
        value = read(name)
        if name not in parameters:
            return value
        noise = torch.empty(value.shape).uniform_(-unit, unit, generator=generator)
        return noise.mul_(value).add_(value)

    off = (streamed_logits(model, moved, input_ids) - logits).abs().amax(dim=(0, 2))
    return off / logits.abs().max().clamp(min=1.0)


def logit_difference(logits: Tensor, reference: Tensor) -> float:
    """Largest absolute difference as a share of the reference's largest absolute value (at least 1)."""
    return relative_difference(logits, reference, floor=1.0)


def reloaded_logits(directory: Path, input_ids: Tensor, trust_remote_code: bool = False) -> tuple[Tensor, str]:
    """The logits [B, T, V] of the exported directory as a user gets them, float32, and how it was loaded.

    Loaded whole by transformers where the memory allows it, else layer by layer with the engine's own loader. Raises
    `ValueError` when a weight is missing, left over, empty or carries a wrapper's prefix.
    """
    source = ModelSource(directory=directory, trust_remote_code=trust_remote_code)
    weights = Weights(source, source.config(), Method(name="none"), 0)
    assert weights.stored is not None
    needed = 4 * sum(p.numel() for p in weights.stored.model.parameters())
    if needed <= ROOM * available_memory(torch.device("cpu")):
        return logits_of(reload(directory, trust_remote_code), input_ids), "from_pretrained"
    _require_all(directory, {}, weights.stored.unused, [n for n, t in weights.stored.stored.items() if 0 in t.shape])
    return streamed_logits(weights.stored.model, weights.read, input_ids), "layer by layer"


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
    _require_all(directory, wrong, [], [name for name, tensor in model.state_dict().items() if tensor.numel() == 0])
    return model.eval()


def _require_all(directory: Path, wrong: dict[str, list[str]], unused: list[str], empty: list[str]) -> None:
    if unused:
        wrong = {**wrong, "unexpected_keys": sorted(unused)[:3]}
    if wrong or empty:
        raise ValueError(
            f"{directory} does not reload: {wrong or ''} {'empty: ' + ', '.join(empty[:3]) if empty else ''}"
        )
