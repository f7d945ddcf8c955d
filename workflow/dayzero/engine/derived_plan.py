"""A tensor-parallel plan for models that ship none, found by watching a small copy compute and proved on it.

1. A copy with few layers and heads and random weights runs once. Linear layers that are called with one and the same
   input (query, key, value; gate, up) are split by columns; the next one, whose output is as wide as the model, by
   rows.
2. The split is tried in one process: the batch holds one copy of the rows for each rank, a split layer gives every copy
   its own rank's part of the matrix, and a row-split layer adds the copies up. All that lies between sees what it would
   see on that rank. Logits and all gradients must be those of the whole copy.

So nothing is assumed about an architecture: fused projections whose halves would be cut apart, head counts fixed in a
reshape and attention biases made for all heads give other numbers, or an error, and are refused. Where modules keep
their number of heads or their width in an attribute, it is divided by tp if that makes the numbers right.

The same numbers say which other parameters lie between split layers (norms of single heads): there each rank has a part
of the gradient, so that the copies' gradients add up to the whole one instead of to tp times it. And the copy shows
which outputs of row-split layers the model writes into: those it must be given as tensors of its own.

Shapes: B rows, T tokens, R = tp ranks, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dayzero.engine.difference import relative_difference
from dayzero.engine.structure import find_layers

TOLERANCE = 1e-4
"""Largest difference that is rounding, as a share of the largest value: some models compute in float32 whatever their
weights. What is wrong differs by far more, since all weights are random."""

NOISE = 1e-2
"""A gradient below this share of the model's largest is compared with that share of it: some are zero but for rounding,
such as those of key biases, which softmax takes out."""

VOCAB_SIZE = 64
COLUMN, ROW, GRADIENT_SUM = "colwise", "rowwise", "replicated_with_grad_allreduce"
ROW_WRITTEN = f"{ROW}_written"
"""Row-split, and the model writes into the output (Llama 4 adds its routed experts to the shared one in place)."""
SPLIT = COLUMN, ROW, ROW_WRITTEN


class NoPlan(Exception):
    """No split was found that computes what the model computes; the message says why."""


@dataclass(frozen=True)
class DerivedPlan:
    """Names are written with `*` for the numbers of layers."""

    styles: dict[str, str]
    """Module -> how it is split, or that its gradients are summed."""
    divided: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Module -> attributes to be divided by tp."""


def derive_plan(model: PreTrainedModel, tp: int) -> DerivedPlan:
    """A plan for `model` (on any device, adapters or not; it is not changed) on `tp` ranks. Raises `NoPlan`."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        small = _small_copy(model, tp)
        styles = _find_splits(small)
        if unsplit := unsplit_matrix(model, styles):
            raise NoPlan(unsplit)
        return _prove(small, styles, tp)


def prove_plan(model: PreTrainedModel, styles: dict[str, str], tp: int) -> DerivedPlan:
    """The plan that `model` ships, as far as a small copy confirms it: with the sums of gradients that it needs.

    `styles` are of column- and row-split linears. Without a small copy it is taken as it is. Raises `NoPlan` where the
    split copy gives other numbers.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        try:
            small = _small_copy(model, tp)
        except NoPlan:
            return DerivedPlan(styles)
        return _prove(small, styles, tp)


def unsplit_matrix(model: PreTrainedModel, styles: dict[str, str]) -> str | None:
    """The first matrix of the layers that `styles` leaves whole, in words; None if there is none."""
    layers = find_layers(model)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    for name, module in layers.named_modules():
        if "lora_" in name or styles.get(wildcard(f"{prefix}.{name}".removesuffix(".base_layer"))) in SPLIT:
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                kind = type(module).__name__
                return f"{prefix}.{name}.{parameter_name} ({kind}) is none of the linear layers that can be split"
    return None


def wildcard(name: str) -> str:
    """The name as plans write it: layer numbers as `*`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _small_copy(model: PreTrainedModel, tp: int) -> PreTrainedModel:
    """A model of the same class with random weights: in float64 with few heads, or what else works."""
    if not getattr(model.config.get_text_config(), "num_attention_heads", None):
        raise NoPlan("its config has no num_attention_heads")
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):  # one that needs a process group or a GPU
        attention = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    for shrink_heads, dtype in ((True, torch.float64), (True, torch.float32), (False, torch.float32)):
        config = _small_config(model.config, tp, shrink_heads=shrink_heads)
        config._attn_implementation = attention
        try:
            small = type(model)(config).eval()
            small.to(dtype=dtype)
            _logits(small, 1)
        except Exception as error:
            problem = (
                f"a small copy of it cannot be made ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
            )
            continue
        with torch.no_grad():
            for parameter in small.parameters():
                noise = torch.randn_like(parameter)
                if parameter.ndim > 1:
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
                else:  # norms that are all ones and biases that are all zero would hide a mistake
                    parameter.add_(0.5 * noise)
        return small
    raise NoPlan(problem)


def _small_config(config: PretrainedConfig, tp: int, *, shrink_heads: bool) -> PretrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    # as many layers as it takes to see every kind of layer
    lists = [v for v in vars(text).values() if isinstance(v, list) and len(v) == layers]
    keep = max([2, *(max(map(v.index, v)) + 1 for v in lists)])
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:keep])
        elif name.endswith("_token_id") and isinstance(value, int) and value >= VOCAB_SIZE:
            setattr(text, name, 0)
    text.num_hidden_layers = min(layers, keep)
    text.vocab_size = VOCAB_SIZE
    if not shrink_heads:
        return config
    groups = max(1, heads // (getattr(text, "num_key_value_heads", None) or heads))
    head_dim, width = text.hidden_size // heads, text.hidden_size
    # numbers of heads that no other number of the model equals: attributes are told apart by their values
    numbers = {groups, head_dim} | {v for v in vars(text).values() if type(v) is int}
    key_value_heads = next(n for n in range(3 * tp, 99 * tp, 2 * tp) if not {n, n * groups} & numbers)
    for name, value in list(vars(text).items()):
        if type(value) is int and value == width:
            setattr(text, name, key_value_heads * groups * head_dim)
        elif type(value) is int and any(part in name for part in ("ffn", "intermediate", "inner")):
            setattr(text, name, 9 * tp)
    text.hidden_size, text.num_attention_heads = key_value_heads * groups * head_dim, key_value_heads * groups
    if getattr(text, "num_key_value_heads", None):
        text.num_key_value_heads = key_value_heads
    return config


def _logits(model: PreTrainedModel, copies: int) -> Tensor:
    """[copies * 2, T, V] of fixed tokens."""
    tokens = torch.randint(1, VOCAB_SIZE, (2, 7), generator=torch.Generator().manual_seed(1))
    places = torch.arange(7).expand(2 * copies, 7)
    return model(input_ids=tokens.repeat(copies, 1), position_ids=places, use_cache=False).logits


def _find_splits(model: PreTrainedModel) -> dict[str, str]:
    """The style of each linear layer by who gets whose output, without proof. Raises `NoPlan`."""
    layers = find_layers(model)
    calls: list[tuple[str, nn.Linear, Tensor]] = []  # the inputs are kept, so that no two have the same identity
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: calls.append((name, m, args[0])))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(module is m for m in layers.modules())
    ]
    _logits(model, 1)
    for handle in handles:
        handle.remove()
    width = model.config.get_text_config().hidden_size
    styles: dict[str, str] = {}
    columns: list[str] = []
    given: Tensor | None = None
    for name, linear, x in calls:
        if given is None or x is given:
            given = x
            columns.append(name)
            continue
        if linear.out_features != width:
            raise NoPlan(f"{name} takes what {', '.join(columns)} gave, but is {linear.out_features} wide, not {width}")
        found = {**dict.fromkeys(map(wildcard, columns), COLUMN), wildcard(name): ROW}
        if clash := [key for key, style in found.items() if styles.get(key, style) != style]:
            raise NoPlan(f"{clash[0]} has two parts to play in different layers")
        styles |= found
        columns, given = [], None
    if columns:
        raise NoPlan(f"nothing takes what {', '.join(columns)} gave")
    return styles


@torch.enable_grad()  # what is asked for without gradients (logits) is proved with them too
def _prove(model: PreTrainedModel, styles: dict[str, str], tp: int) -> DerivedPlan:
    """Compare the split copy with the whole one. Raises `NoPlan`."""
    whole = _logits(model, 1)
    directions = torch.randn_like(whole)
    gradients = _gradients(model, (whole * directions).sum())
    problem = ""
    for divided in _attributes(model, styles, tp):
        with _split(model, styles, divided, tp) as outputs:
            try:
                logits = _logits(model, tp)
                off = relative_difference(logits, whole.repeat(tp, 1, 1), floor=1e-12)
                if off <= TOLERANCE:
                    summed = _gradients(model, (logits * directions.repeat(tp, 1, 1)).sum())
                    found = {**styles, **_partial(model, styles, gradients, summed, tp)}
                    written = {wildcard(name): ROW_WRITTEN for name, output in outputs.items() if output._version}
                    return DerivedPlan({**found, **written}, divided)
                problem = f"split over {tp} ranks its logits would be off by {off:.2g} of their size"
            except NoPlan:
                raise
            except Exception as error:
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                problem = f"split over {tp} ranks it cannot compute ({said})"
    raise NoPlan(problem)


def _attributes(model: PreTrainedModel, styles: dict[str, str], tp: int) -> Iterator[dict[str, tuple[str, ...]]]:
    """Attributes to divide by tp in the modules around split layers: none; numbers of heads; these and widths."""
    text = model.config.get_text_config()
    heads = {text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads}
    widths = {m.out_features for name, m in model.named_modules() if styles.get(wildcard(name)) == COLUMN}
    around = [(n, m) for n, m in model.named_modules() if any(wildcard(f"{n}.{c}") in styles for c in _names(m))]
    for values in (set(), heads, heads | widths):
        # in all layers alike: a layer's own number may happen to be that of its heads
        found: dict[str, set[str]] = {}
        for name, module in around:
            named = {k for k, v in vars(module).items() if type(v) is int and v in values and v % tp == 0}
            found[wildcard(name)] = found.get(wildcard(name), named) & named
        yield {name: tuple(sorted(attributes)) for name, attributes in found.items() if attributes}


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_children()]


class _SumBackward(torch.autograd.Function):
    """What a column-split layer does to its input: nothing, and the ranks' gradients are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: int) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _sum_of_copies(gradients[0], ctx.tp), None


class _SumForward(torch.autograd.Function):
    """What a row-split layer does to its output: the ranks' parts are added up, and each has the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: int) -> Tensor:
        return _sum_of_copies(x, tp)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _sum_of_copies(x: Tensor, tp: int) -> Tensor:
    """[R * B, ...] -> [R * B, ...], every rank's rows replaced by the sum over the ranks."""
    total = x.unflatten(0, (tp, -1)).sum(0)
    return total.repeat(tp, *[1] * (total.ndim - 1))


def _column_forward(linear: nn.Linear, tp: int, x: Tensor) -> Tensor:
    """[R * B, T, in] -> [R * B, T, out / R]"""
    biases = [None] * tp if linear.bias is None else linear.bias.chunk(tp)
    parts = zip(_SumBackward.apply(x, tp).chunk(tp), linear.weight.chunk(tp), biases, strict=True)
    return torch.cat([F.linear(part, weight, bias) for part, weight, bias in parts])


def _row_forward(linear: nn.Linear, tp: int, x: Tensor) -> Tensor:
    """[R * B, T, in / R] -> [R * B, T, out]"""
    parts = zip(x.chunk(tp), linear.weight.chunk(tp, dim=1), strict=True)
    total = _SumForward.apply(torch.cat([F.linear(part, weight) for part, weight in parts]), tp)
    return total if linear.bias is None else total + linear.bias


@contextmanager
def _split(
    model: PreTrainedModel, styles: dict[str, str], divided: dict[str, tuple[str, ...]], tp: int
) -> Iterator[dict[str, Tensor]]:
    """While active, `model` computes as `tp` ranks would, each on its own copy of the rows.

    Yields what the row-split layers gave in the last forward pass.
    """
    forwards: dict[str, Callable[..., Tensor]] = {COLUMN: _column_forward, ROW: _row_forward}
    undo: list[Callable[[], None]] = []
    outputs: dict[str, Tensor] = {}
    try:
        for name, module in model.named_modules():
            if style := styles.get(wildcard(name)):
                module.forward = partial(forwards[style], module, tp)
                undo.append(partial(delattr, module, "forward"))
            if style == ROW:
                keep = module.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
                undo.append(keep.remove)
            for attribute in divided.get(wildcard(name), ()):
                if attribute not in vars(module):
                    continue  # a layer of another kind
                value = getattr(module, attribute)
                setattr(module, attribute, value // tp)
                undo.append(partial(setattr, module, attribute, value))
        yield outputs
    finally:
        for action in undo:
            action()


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Parameter -> gradient; without those that the loss does not reach."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def _partial(
    model: PreTrainedModel, styles: dict[str, str], whole: dict[str, Tensor], summed: dict[str, Tensor], tp: int
) -> dict[str, str]:
    """Modules of whose gradients each rank has a part. Raises `NoPlan` for one that is neither part nor whole."""
    found: dict[str, str] = {}
    floor = NOISE * max(gradient.abs().max().item() for gradient in whole.values())
    for name, gradient in whole.items():
        owner, _, kind = name.rpartition(".")
        style = styles.get(wildcard(owner))
        split = style == COLUMN or (style == ROW and kind == "weight")
        if not split and relative_difference(summed[name], tp * gradient, floor) <= TOLERANCE:
            parts = False
        elif relative_difference(summed[name], gradient, floor) <= TOLERANCE:
            parts = True
        else:
            raise NoPlan(f"split over {tp} ranks the gradient of {name} would be wrong")
        if not split:
            style = GRADIENT_SUM if parts else ""
            if found.setdefault(wildcard(owner), style) != style:
                raise NoPlan(f"of the gradients of {owner} each rank would have some whole and some in part")
    return {name: style for name, style in found.items() if style}
