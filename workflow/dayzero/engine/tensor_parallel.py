"""Tensor parallelism: attention and MLP matrices split over the tp axis, by the model's own plan or a derived one.

transformers ships the plan of many models (`base_model_tp_plan`: which linear is split by columns, which by rows), and
the module hooks that turn activations into DTensors and back. Three things are added here:

- Adapters. A column-split linear with LoRA splits its base and lora_B by columns and keeps lora_A whole; a row-split
  one splits its base and lora_A by rows and keeps lora_B whole, so that the update is split exactly like the weight.
- Norms inside the split (query and key norms): each rank sees its own heads, so their gradients are summed over tp
  after the backward pass. Without it the loss is off by 1e-3, with no error.
- Sequence parallelism (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198): between the split parts each rank
  keeps only its share of the tokens, so norms and residuals are neither computed nor stored twice.

Shapes: B rows, T tokens, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, RowwiseParallel, apply_tensor_parallelism

from dayzero.engine.derived_plan import (
    COLUMN,
    GRADIENT_SUM,
    ROW,
    ROW_WRITTEN,
    SPLIT,
    DerivedPlan,
    NoPlan,
    derive_plan,
    prove_plan,
    unsplit_matrix,
    wildcard,
)
from dayzero.engine.structure import find_layers
from dayzero.engine.token_split import require_sequence_parallel
from dayzero.errors import ConfigError

ROW_SCATTERED = "dayzero_rowwise_scattered"
"""Row-split, each rank keeping its share of the tokens of the sum (a reduce-scatter in place of an all-reduce)."""


class _OwnOutput(RowwiseParallel):
    """Gives a copy of its output: what comes out of a DTensor is a view that must not be written into."""

    def transform_output_post_forward(self, module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
        return super().transform_output_post_forward(module, output, mesh).clone()


for _name, _style in (
    (ROW_SCATTERED, RowwiseParallel(output_layouts=Shard(1))),
    (f"{ROW}_written", _OwnOutput()),
    (f"{ROW_SCATTERED}_written", _OwnOutput(output_layouts=Shard(1))),
):
    ALL_PARALLEL_STYLES.register(_name, _style)  # type: ignore[arg-type]


def tensor_parallel_plan(model: PreTrainedModel, tp: int, *, sequence_parallel: bool = False) -> DerivedPlan:
    """Style of every split linear and every norm between them by the module's full name, adapters left out.

    It is the model's own plan or, where it ships none, a derived one: see `derived_plan.py`.
    Raises `ConfigError` with the equation where a size does not divide by `tp`, or where no plan is right.
    """
    own = {name: style for name, style in (model.tp_plan or {}).items() if style in (COLUMN, ROW, GRADIENT_SUM)}
    _check_divides(tp, _heads(model))
    # a plan may split nothing here: by styles of its own, or parameters of experts, which are no modules
    ships_one = any(own.get(wildcard(name)) in SPLIT for name, _ in model.named_modules())
    plan = _confirmed(model, own, tp) if ships_one else _derived(model, tp, sequence_parallel)
    found = {name: plan.styles[key] for name, _ in model.named_modules() if (key := wildcard(name)) in plan.styles}
    sizes = _heads(model)
    for name, style in found.items():
        if style in SPLIT:
            module = model.get_submodule(name)
            linear = cast(nn.Linear, getattr(module, "base_layer", module))
            what, size = ("outputs", linear.out_features) if style == COLUMN else ("inputs", linear.in_features)
            sizes[f"{name} has {what}"] = size
    _check_divides(tp, sizes)
    if sequence_parallel:
        require_sequence_parallel(model, [name for name, style in found.items() if style == COLUMN], tp)
    return DerivedPlan(found, {n: plan.divided.get(wildcard(n), ()) for n, _ in model.named_modules()})


def _confirmed(model: PreTrainedModel, own: dict[str, str], tp: int) -> DerivedPlan:
    """The model's own plan, tried on a small copy: some that ship are wrong, and not all of these with an error."""
    try:
        proved = prove_plan(model, {name: style for name, style in own.items() if style != GRADIENT_SUM}, tp)
    except NoPlan as reason:
        name = type(model).__name__
        raise ConfigError(
            f"parallelism.tp {tp}: the tensor-parallel plan that {name} ships is wrong: {reason}: use dp_shard"
        ) from None
    return DerivedPlan({**own, **proved.styles}, proved.divided)


def _derived(model: PreTrainedModel, tp: int, sequence_parallel: bool) -> DerivedPlan:
    says = f"parallelism.tp {tp}: {type(model).__name__} ships no tensor-parallel plan that can be used"
    if sequence_parallel:
        raise ConfigError(f"{says}, which parallelism.sequence_parallel needs: turn sequence_parallel off")
    try:
        plan = derive_plan(model, tp)
        if unsplit := unsplit_matrix(model, plan.styles):
            raise NoPlan(unsplit)
    except NoPlan as reason:
        raise ConfigError(f"{says} and none can be derived: {reason}: use dp_shard") from None
    return plan


def apply_tensor_parallel(model: PreTrainedModel, mesh: DeviceMesh, *, sequence_parallel: bool) -> set[int]:
    """Split the meta-device `model` over the one-dimensional `mesh`.

    Returns the ids of the modules whose parameters' gradients each rank has only a part of: see `partial_parameters`.
    """
    found = tensor_parallel_plan(model, mesh.size(), sequence_parallel=sequence_parallel)
    plan = found.styles
    for name, attributes in found.divided.items():
        for attribute in attributes:
            module = model.get_submodule(name)
            if attribute in vars(module):  # not in a layer of another kind
                setattr(module, attribute, getattr(module, attribute) // mesh.size())
    split: dict[str, str] = {}
    partial = {id(model.get_submodule(name)) for name, style in plan.items() if style == GRADIENT_SUM}
    for name, style in plan.items():
        if style == GRADIENT_SUM:
            continue
        module = model.get_submodule(name)
        row = ROW_SCATTERED if sequence_parallel else ROW
        actual = COLUMN if style == COLUMN else row
        if not hasattr(module, "lora_A"):
            split[name] = f"{row}_written" if style == ROW_WRITTEN else actual
            continue
        split[f"{name}.base_layer"] = actual
        adapters = "lora_B" if style == COLUMN else "lora_A"
        split |= {f"{name}.{adapters}.{adapter}": actual for adapter in getattr(module, adapters)}
        if sequence_parallel and style != COLUMN:
            partial |= {id(b) for b in cast(nn.ModuleDict, module.lora_B).values()}  # sees this rank's tokens only
    apply_tensor_parallelism(model, mesh, {wildcard(name): style for name, style in split.items()})
    if sequence_parallel:
        partial |= _apply_sequence_parallel(model, mesh, [n for n, style in plan.items() if style == COLUMN])
    return partial


def partial_parameters(module: nn.Module, partial: set[int]) -> list[nn.Parameter]:
    """The trainable parameters of the modules `apply_tensor_parallel` named; ask after FSDP2 has replaced them."""
    return [p for m in module.modules() if id(m) in partial for p in m.parameters(recurse=False) if p.requires_grad]


@torch.no_grad()
def sum_partial_gradients(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Add up over `group` the gradients of which each of its ranks has only a part."""
    for parameter in parameters:
        if parameter.grad is not None:
            grad = parameter.grad
            dist.all_reduce(grad.to_local() if isinstance(grad, DTensor) else grad, group=group)


def pad_tokens(x: Tensor, multiple: int, value: int | None) -> Tensor:
    """[B, T] padded on the right to a multiple of `multiple` tokens; `value` None counts on from each row's last."""
    missing = -x.shape[1] % multiple
    if not missing:
        return x
    if value is None:
        return torch.cat([x, x[:, -1:] + torch.arange(1, missing + 1, device=x.device)], dim=1)
    return torch.nn.functional.pad(x, (0, missing), value=value)


def _heads(model: PreTrainedModel) -> dict[str, int]:
    """What the model's config says of heads -> how many."""
    config = model.config.get_text_config()
    fields = ("num_attention_heads", "num_key_value_heads")
    return {f"the model has {field}": heads for field in fields if (heads := getattr(config, field, None))}


def _check_divides(tp: int, sizes: dict[str, int]) -> None:
    """Raise `ConfigError` for the first of the sizes that tp does not divide, with one that divides them all."""
    common = math.gcd(*sizes.values())
    for what, size in sizes.items():
        if size % tp:
            remedy = f"use a divisor of {common}" if common > 1 else "no tp divides all that it must: use dp_shard"
            raise ConfigError(f"parallelism.tp {tp}: {what} {size} / {tp} = {size / tp:.4g}: {remedy}")


def _apply_sequence_parallel(model: PreTrainedModel, mesh: DeviceMesh, columns: list[str]) -> set[int]:
    """Keep [B, T / tp, D] outside the split parts. Returns the modules that then see only this rank's tokens."""
    layers = find_layers(model)
    # attention and MLP read their own input's shape, so tokens are gathered in front of them, not of each linear
    inside = [model.get_submodule(name) for name in dict.fromkeys(name.rpartition(".")[0] for name in columns)]
    for module in inside:
        module.register_forward_pre_hook(_on_input(lambda x: _gather(x, mesh)), with_kwargs=True)
    layers[0].register_forward_pre_hook(_on_input(lambda x: _scatter(x, mesh)), with_kwargs=True)
    layers[-1].register_forward_hook(_on_output(lambda x: _gather(x, mesh)))
    within = {id(m) for module in inside for m in module.modules()}
    return {id(m) for m in layers.modules() if id(m) not in within}


def _on_input(change: Callable[[Tensor], Tensor]) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """A pre-hook that changes the hidden states, passed by position or by name."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return hook


def _on_output(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A hook that changes the hidden states of an output, alone or first of a tuple."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook


def _gather(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """[B, T / tp, D] -> [B, T, D], of which every rank computes the same gradient."""
    return DTensor.from_local(x, mesh, [Shard(1)], run_check=False).redistribute(placements=[Replicate()]).to_local()


def _scatter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """[B, T, D], the same on all ranks -> [B, T / tp, D]."""
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).redistribute(placements=[Shard(1)]).to_local()
