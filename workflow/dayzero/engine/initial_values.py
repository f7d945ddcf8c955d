"""What a model's tensors are before training where no checkpoint says so: random weights, buffers, adapters.

transformers' and PEFT's own initialisation runs, on the CPU, on one module at a time under a seed that is made of the
run's seed and the tensor's name. So every rank can make just what it holds, a value depends neither on the mesh nor on
the order in which it is made, and no process ever has the whole model.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization

from dayzero.config import Lora
from dayzero.engine.lora import ADAPTER, inject_lora, peft_config
from dayzero.engine.share import Share


class InitialValues:
    """The initial values of `template`, a model on the meta device without adapters, and of adapters put into it."""

    def __init__(
        self, template: PreTrainedModel, seed: int, lora: Lora | None, construct: Callable[[], PreTrainedModel]
    ) -> None:
        self.template = copy.deepcopy(template)
        self.seed, self.construct = seed, construct
        untie(self.template, self.template.all_tied_weights_keys)
        self.makers = _makers_of_base(self.template)
        """Names of tensors that are made together -> what makes them, once they have memory."""
        self.names = {name for names in self.makers for name in names}
        self.adapted: PreTrainedModel | None = None
        if lora is not None:
            self.adapted = copy.deepcopy(template)
            with torch.device("meta"):
                inject_lora(self.adapted, lora)
            self.adapter_makers = _makers_of_adapters(self.adapted, lora)

    def fill(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Give `tensors` (DTensors or plain, by the model's names without adapters) their values; the names known.

        A few architectures leave some tensors as their constructor makes them, so that one has to run: the only case
        in which the whole model is in memory, until its tensors are copied.
        """
        filled = self._fill(self.template, self.makers, tensors)
        if left := (set(tensors) & self.names) - filled:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(_seed(self.seed, ""))
                whole = self.construct()
            values = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
            for name in left:
                Share(tensors[name]).fill(values[name])
        return filled | left

    def fill_adapters(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """The same for the tensors of adapters, by the adapted model's names."""
        return self._fill(self.adapted, self.adapter_makers, tensors) if self.adapted is not None else set()

    def _fill(
        self,
        model: PreTrainedModel,
        makers: Mapping[tuple[str, ...], list[Callable[[], None]]],
        tensors: Mapping[str, Tensor],
    ) -> set[str]:
        filled: set[str] = set()
        for names, make in makers.items():
            shares = {name: Share(tensors[name]) for name in names if name in tensors}
            if all(share.empty for share in shares.values()):
                filled |= set(shares)
                continue
            if not make:
                continue
            with memory_for(model, names) as values, torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(_seed(self.seed, names[0]))
                for function in make:
                    function()
                for name, share in shares.items():
                    if values[name].is_floating_point() and values[name].isnan().any():
                        continue  # the model's code does not make it
                    share.fill(values[name])
                    filled.add(name)
        return filled


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def untie(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Give the tied parameters `names` of the meta-device `model` a tensor each."""
    for name in names:
        parent, _, attribute = name.rpartition(".")
        module = model.get_submodule(parent)
        tensor = getattr(module, attribute)
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(attribute, nn.Parameter(torch.empty_like(tensor), tensor.requires_grad))


def _makers_of_base(model: PreTrainedModel) -> dict[tuple[str, ...], list[Callable[[], None]]]:
    """Which calls of `_init_weights` make which tensors, found by one run on the meta device: a tensor that is written
    to counts a version up. A call may write to tensors of modules inside (gpt2's residual projections)."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = {id(tensor): name for name, tensor in tensors.items()}
    calls: list[tuple[Callable[[], None], set[str]]] = []
    with torch.no_grad(), _writes_counted():
        for owner, module in _in_order(model, model):
            inside = [*module.parameters(), *module.buffers()]
            before = [tensor._version for tensor in inside]
            call = _call(owner, module)
            call()
            written = {names[id(t)] for t, version in zip(inside, before, strict=True) if t._version != version}
            calls.append((call, written))
    groups: dict[str, set[str]] = {name: {name} for name in tensors}
    for _, written in calls:
        joined = set().union(*(groups[name] for name in written))
        for name in joined:
            groups[name] = joined
    makers: dict[tuple[str, ...], list[Callable[[], None]]] = {tuple(sorted(group)): [] for group in groups.values()}
    for call, written in calls:
        if written:
            makers[tuple(sorted(groups[next(iter(written))]))].append(call)
    return makers


@contextmanager
def _writes_counted() -> Iterator[None]:
    """Torch's initialisers count as writes on the meta device too, where some (trunc_normal_) do nothing at all."""

    def write(tensor: Tensor, *_: object, **__: object) -> Tensor:
        return tensor.zero_()

    functions = initialization.TORCH_INIT_FUNCTIONS
    real = dict(functions)
    functions.update(dict.fromkeys(real, write))
    try:
        with initialization.guard_torch_init_functions():  # also where a model calls torch's own
            yield
    finally:
        functions.update(real)


def _in_order(owner: PreTrainedModel, module: nn.Module) -> Iterator[tuple[PreTrainedModel, nn.Module]]:
    """Modules from the inside out, each with the model whose `_init_weights` is in charge, as transformers does."""
    for child in module.children():
        yield from _in_order(child if isinstance(child, PreTrainedModel) else owner, child)
    yield owner, module


def _call(owner: PreTrainedModel, module: nn.Module) -> Callable[[], None]:
    return lambda: owner._init_weights(module)


def _makers_of_adapters(model: PreTrainedModel, lora: Lora) -> dict[tuple[str, ...], list[Callable[[], None]]]:
    how = peft_config(lora).init_lora_weights
    makers: dict[tuple[str, ...], list[Callable[[], None]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer = cast(nn.Module, module)
            parts = [part for part in module.adapter_layer_names if hasattr(layer, part)]
            names = [f"{path}.{p}.{name}" for p in parts for name, _ in getattr(layer, p).named_parameters()]
            makers[tuple(sorted(names))] = [lambda module=module: module.reset_lora_parameters(ADAPTER, how)]  # type: ignore[misc]
    return makers


@contextmanager
def memory_for(
    model: PreTrainedModel, names: tuple[str, ...], given: Mapping[str, Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """These tensors of the meta-device `model` on the CPU until the block ends, whole: those given, or not a number."""
    meta: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    values: dict[str, Tensor] = {}
    for name in names:
        parent, _, attribute = name.rpartition(".")
        module = model.get_submodule(parent)
        place = cast(
            dict[str, Tensor | None], module._parameters if attribute in module._parameters else module._buffers
        )
        tensor = cast(Tensor, place[attribute])
        if given and name in given:
            value = given[name]
        else:
            value = torch.empty_like(tensor, device="cpu", requires_grad=False)
            value.fill_(float("nan")) if value.is_floating_point() else value.zero_()
        values[name] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
        meta.append((place, attribute, tensor))
        place[attribute] = values[name]
    try:
        yield values
    finally:
        for place, attribute, tensor in meta:
            place[attribute] = tensor
