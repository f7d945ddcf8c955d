"""FP8 training through NVIDIA's transformer-engine: its linear modules in place of torch's, under its autocast.

https://docs.nvidia.com/deeplearning/transformer-engine/user-guide/api/pytorch.html; it runs on NVIDIA GPUs only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from dayzero.config import Fp8
from dayzero.engine.requirements import require_gpu_and_package
from dayzero.errors import ConfigError

RECIPES = {
    "tensorwise": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
"""train.fp8.recipe -> the class in transformer_engine.common.recipe."""


def require_transformer_engine(recipe: str) -> None:
    """Raise `ConfigError` where the package cannot run, or lacks the recipe."""
    require_gpu_and_package("train.fp8.backend transformer_engine", "transformer-engine[pytorch]", "use torchao")
    _recipe(recipe)


def swap_linears(model: nn.Module, names: dict[str, nn.Linear]) -> None:
    """Put the package's linear modules in place of `names` in the meta-device `model`; parameters stay the same."""
    import transformer_engine.pytorch as te

    for name, linear in names.items():
        own = te.Linear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            params_dtype=linear.weight.dtype,
            device=str(linear.weight.device),  # compared with the text "meta": a torch.device would take memory
        )
        own.weight = linear.weight
        if linear.bias is not None:
            own.bias = linear.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, own)


def float8_autocast(fp8: Fp8 | None) -> AbstractContextManager[Any]:
    """Around a forward pass: where `fp8` asks for it the package's modules compute in 8 bits by its recipe."""
    if fp8 is None or fp8.backend != "transformer_engine":
        return nullcontext()
    import transformer_engine.pytorch as te

    if hasattr(te, "autocast"):
        return te.autocast(enabled=True, recipe=_recipe(fp8.recipe))
    return te.fp8_autocast(enabled=True, fp8_recipe=_recipe(fp8.recipe))  # before transformer-engine 2.8


def token_multiple(fp8: Fp8 | None) -> int:
    """What the number of tokens of a forward pass must be a multiple of for the package's products."""
    if fp8 is None or fp8.backend != "transformer_engine":
        return 1
    return 32 if fp8.recipe == "mxfp8" else 8


def is_extra_state(name: str) -> bool:
    """Whether an entry of a state dict is what the package's modules keep of their scales: made anew, never saved."""
    return name.endswith("._extra_state")


def _recipe(name: str) -> Any:
    from transformer_engine.common import recipe

    if not hasattr(recipe, RECIPES[name]):
        raise ConfigError(f"train.fp8.recipe {name}: this transformer-engine has no {RECIPES[name]}: use delayed")
    return getattr(recipe, RECIPES[name])()
