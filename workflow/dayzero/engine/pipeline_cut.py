"""Where a model can be cut into pipeline stages, found by trying it on the meta device: no class names, no tables.

A model can be cut between its layers if nothing but the hidden states passes from one to the next. Autograd knows: each
layer's input is replaced by a fresh leaf, and a layer's output must then come from that leaf and the layer's own
parameters alone. What the first layer's input comes from belongs to the first stage (the embedding), what the logits
come from behind the last layer belongs to the last (final norm, head); a parameter of both is tied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.structure import find_decoder, find_layers
from dayzero.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """What a pipeline has to know of a model. Names are those of `model.named_modules()`."""

    layers: str
    """Name of the list of layers."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    output: tuple[type, int]
    """What a layer returns: a tensor (Tensor, 1), or so many things in a tuple or list, the hidden states first."""
    first: tuple[str, ...]
    """Modules used before the layers (the embedding) or never, outermost ones with parameters."""
    last: tuple[str, ...]
    """Modules used behind the layers (final norm, head)."""
    tied: tuple[tuple[str, str], ...]
    """Pairs of parameter names with one value: in the first modules, in the last ones."""


def anatomy(model: PreTrainedModel, pp: int) -> Anatomy:
    """Try the meta-device `model`, which stays as it is.

    Raises `ConfigError` where it cannot be cut, with the reason.
    """

    def refuse(reason: str) -> ConfigError:
        return ConfigError(f"parallelism.pp {pp}: {type(model).__name__} cannot be cut: {reason}; use dp_shard or tp")

    try:
        layers = find_layers(model)
        find_decoder(model)
    except ValueError as error:
        raise refuse(str(error).partition(":")[0]) from error
    path, ends, loose = _around(model, layers)
    if loose:
        raise refuse(f"{loose[0]} belongs to no module before or behind the layers")
    found = _trace(model, path, ends, refuse)
    names = _canonical_names(model)
    held = {end: {names[n] for n, _ in model.get_submodule(end).named_parameters(prefix=end)} for end in ends}
    tied: list[tuple[str, str]] = []
    for shared in sorted(found.before & found.behind):
        pair = [[e for e in called if shared in held[e]] for called in (found.called_before, found.called_behind)]
        if [len(holders) for holders in pair] != [1, 1]:
            raise refuse(f"{shared} is used both before and behind the layers, but not by two modules")
        (one,), (other,) = pair
        aliases = [alias for alias, name in names.items() if name == shared]
        early, late = (next(a for a in aliases if a.startswith(f"{end}.")) for end in (one, other))
        tied.append((early, late))
    if both := [end for end in ends if end in found.called_before and end in found.called_behind]:
        raise refuse(f"{both[0]} is used both before and behind the layers")
    last = [end for end in ends if end in found.called_behind]
    if strange := sorted(found.behind - {name for end in last for name in held[end]}):
        raise refuse(f"{strange[0]} is used behind the layers, but its module is not called there")
    return Anatomy(
        layers=path,
        num_layers=len(layers),
        hidden_size=found.hidden_size,
        vocab_size=found.vocab_size,
        output=found.output,
        first=tuple(end for end in ends if end not in last),
        last=tuple(last),
        tied=tuple(tied),
    )


def check_pipeline(model: PreTrainedModel, dims: ParallelDims) -> None:
    """Raise `SizeError` or another `ConfigError` where the meta-device `model` cannot be cut as `dims` says, or a stage
    would have nothing to train."""
    found = anatomy(model, dims.pp)
    dims.check_layers(found.num_layers)
    for stage, layers in enumerate(cut_layers(model, found, dims.num_stages)):
        held = [f"{found.layers}.{i}" for i in layers]
        held += [*(found.first if stage == 0 else ()), *(found.last if stage == dims.num_stages - 1 else ())]
        if not any(p.requires_grad for name in held for p in model.get_submodule(name).parameters()):
            raise ConfigError(
                f"parallelism.pp {dims.pp}: nothing is trained in the layers {layers[0]} to {layers[-1]}, which are "
                "one stage: let method.lora.targets reach some of them, or use dp_shard or tp"
            )


def balanced(costs: Sequence[int], first: int, last: int, stages: int) -> list[range]:
    """Cut layers with `costs` into `stages` runs of at least one, `first` and `last` counted in the outer ones.

    The largest stage is as small as it can be, and among such cuts the sum of squares is smallest.
    """
    assert 1 <= stages <= len(costs)
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def cost_of(stage: int, start: int, stop: int) -> int:
        ends = (first if stage == 0 else 0) + (last if stage == stages - 1 else 0)
        return sums[stop] - sums[start] + ends

    # best[stop]: (largest, sum of squares, cuts) of the first stages over layers [0, stop)
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, (0,))}
    for stage in range(stages):
        left = stages - 1 - stage
        best = {
            stop: min(
                (max(worst, size), squares + size * size, (*cuts, stop))
                for start, (worst, squares, cuts) in best.items()
                if start < stop
                for size in [cost_of(stage, start, stop)]
            )
            for stop in range(stage + 1, len(costs) - left + 1)
        }
    _, _, cuts = best[len(costs)]
    return [range(a, b) for a, b in pairwise(cuts)]


def cut_layers(model: PreTrainedModel, found: Anatomy, stages: int) -> list[range]:
    """The layers of each of `stages` stages, balanced by the parameters that a stage holds."""

    def size(*names: str) -> int:
        return sum(p.numel() for name in names for p in model.get_submodule(name).parameters())

    costs = [size(f"{found.layers}.{i}") for i in range(found.num_layers)]
    return balanced(costs, size(*found.first), size(*found.last), stages)


@dataclass
class _Trace:
    before: set[str]
    """Parameters that the first layer's input comes from."""
    behind: set[str]
    """Parameters that the logits come from, those of the layers left out."""
    called_before: set[str]
    called_behind: set[str]
    """Modules outside the layers that are called before the first and after the last one."""
    hidden_size: int
    vocab_size: int
    output: tuple[type, int]


class AnyValue(TorchFunctionMode):
    """Lets code that looks at values run on the meta device, where there are none: every value is true or 1."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        if func is torch.Tensor.item and args[0].is_meta:
            return args[0].dtype == torch.bool or 1
        return func(*args, **(kwargs or {}))


def _trace(model: PreTrainedModel, path: str, ends: list[str], refuse: Callable[[str], ConfigError]) -> _Trace:
    """Run a copy of `model` and see what depends on what."""
    # some kernels know only one of the two types on the meta device
    failed: Exception | None = None
    for dtype in (torch.float32, torch.bfloat16):
        try:
            return _trace_in(dtype, model, path, ends, refuse)
        except ConfigError:
            raise
        except Exception as error:  # whatever the model's own code raises
            failed = failed or error
    assert failed is not None
    raise refuse(f"it does not run without values ({' '.join(str(failed).split())[:200]})") from failed


def _trace_in(
    dtype: torch.dtype, model: PreTrainedModel, path: str, ends: list[str], refuse: Callable[[str], ConfigError]
) -> _Trace:
    tried = cast(nn.Module, copy.deepcopy(model)).to(dtype).eval()  # training may leave out layers by chance
    for module in tried.modules():
        if isinstance(module, BaseTunerLayer):  # adapters change nothing here, and some do not run without values
            module.enable_adapters(False)
    layers = tried.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    names = {id(p): name for name, p in tried.named_parameters()}
    for parameter in tried.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    leaves: list[Tensor] = []  # [0]: the first layer's input; [i + 1]: what layer i hands on
    before: set[str] = set()
    forms: set[tuple[type, int]] = set()

    def enter(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor) or hidden.ndim != 3:
            raise refuse(f"its layers take {type(hidden).__name__} first, not hidden states of [rows, tokens, width]")
        if len(leaves) > index + 1:
            raise refuse(f"layer {index} is called several times")
        if index == 0:
            before.update(names[id(v)] for v in _leaves(hidden) if id(v) in names)
            leaves.append(hidden.detach().requires_grad_())
            return ((leaves[0], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": leaves[0]})
        if len(leaves) != index + 1 or hidden is not leaves[index]:
            raise refuse(f"layer {index} does not take just what layer {index - 1} returns")
        return None

    def leave(index: int, layer: nn.Module, _: Any, output: Any) -> Any:
        several = isinstance(output, tuple | list)
        hidden = output[0] if several else output
        forms.add((type(output), len(output)) if several else (Tensor, 1))
        own = {id(p) for p in layer.parameters()} | {id(leaves[index])}
        if strange := [v for v in _leaves(hidden) if id(v) not in own]:
            other = names.get(id(strange[0]), "the output of another layer")
            raise refuse(f"layer {index} also uses {other}")
        if hidden.shape != leaves[index].shape:
            raise refuse(f"layer {index} turns {list(leaves[index].shape)} into {list(hidden.shape)}")
        leaves.append(hidden.detach().requires_grad_())
        return type(output)([leaves[-1], *output[1:]]) if several else leaves[-1]

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(enter, index), with_kwargs=True)
        layer.register_forward_hook(partial(leave, index))
    called: tuple[set[str], set[str]] = set(), set()
    for end in ends:
        for module in tried.get_submodule(end).modules():
            module.register_forward_pre_hook(lambda *_, end=end: called[len(leaves) > 0].add(end))
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    with torch.device("meta"), AnyValue(), torch.enable_grad():
        logits = tried(input_ids=ids, use_cache=False).logits
    if len(leaves) != len(layers) + 1:
        raise refuse(f"only {len(leaves) - 1} of its {len(layers)} layers are called")
    if len(forms) != 1:
        raise refuse("its layers return different things")
    behind = _leaves(logits)
    inner = {id(leaf) for leaf in leaves[:-1]}
    if any(id(v) in inner for v in behind):
        raise refuse("the logits use more than the last layer's output")
    owner: dict[int, int] = {}
    for index, layer in enumerate(layers):
        for parameter in layer.parameters():
            if owner.setdefault(id(parameter), index) != index:
                raise refuse(f"layers {owner[id(parameter)]} and {index} share {names[id(parameter)]}")
    shared = {id(p) for name, p in tried.named_parameters(remove_duplicate=False) if not name.startswith(f"{path}.")}
    used = {id(v) for v in behind} & set(names)
    if strange := [names[i] for i in (used | shared) & set(owner)]:
        raise refuse(f"{strange[0]} is used outside its layer")
    return _Trace(before, {names[i] for i in used}, *called, leaves[-1].shape[-1], logits.shape[-1], forms.pop())


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The tensors with gradient from which `tensor` was computed."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    found: list[Tensor] = []
    seen: set[Any] = {tensor.grad_fn}
    pending: list[Any] = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if (variable := getattr(node, "variable", None)) is not None:
            found.append(variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return found


def _around(model: nn.Module, layers: nn.ModuleList) -> tuple[str, list[str], list[str]]:
    """(name of `layers`, outermost modules with parameters that do not hold them, parameters in none of those)."""
    path = next(name for name, module in model.named_modules() if module is layers)
    ends: list[str] = []
    loose: list[str] = []
    parts = path.split(".")
    for depth in range(len(parts)):
        prefix = ".".join(parts[:depth])
        ancestor = model.get_submodule(prefix)
        full = f"{prefix}." if prefix else ""
        loose += [full + name for name, _ in ancestor.named_parameters(recurse=False)]
        for name, child in ancestor.named_children():
            if name != parts[depth] and any(True for _ in child.parameters()):
                ends.append(full + name)
    return path, ends, loose


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> its first name."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
