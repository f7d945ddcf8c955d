"""Where the values of a model come from, and how they reach the shards of a mesh: no process ever has them all.

The model that is trained is built empty on the meta device, adapted, cut and sharded; then each rank gives memory to
what it holds and fills it, one tensor at a time, with the stored weights of the directory or with initial values. It
asks by the model's own names, so it does not matter how the model is split, nor whether all of its layers are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dayzero.config import Method
from dayzero.engine.float8 import frozen_float8
from dayzero.engine.freeze import freeze
from dayzero.engine.initial_values import InitialValues, untie
from dayzero.engine.lora import MAGNITUDE, inject_lora
from dayzero.engine.lora_targets import resolve_targets
from dayzero.engine.quantized import Nf4Linear, quantize_modules
from dayzero.engine.share import Share
from dayzero.engine.stored_weights import StoredWeights

if TYPE_CHECKING:
    from dayzero.engine.model import ModelSource


class Weights:
    """The model of `source` and `method`: empty, and the values for it.

    Values are float32 and the same for the same seed, whatever the ranks and the mesh. Raises `DataError` where a
    directory lacks some of its weights: from the headers of its files, so on every rank alike, before any waits for
    another.
    """

    def __init__(
        self,
        source: ModelSource,
        config: PretrainedConfig,
        method: Method,
        seed: int,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.source, self.config, self.dtype = source, config, dtype
        template = self.template = self._from_config("meta")
        self.method = method = resolve_targets(template, method)
        """With the targets of LoRA that this model has."""
        self.stored: StoredWeights | None = None
        if source.directory is not None and not source.random_weights:
            self.stored = StoredWeights(source.directory, type(template), config)
        self.tied: dict[str, str] = self.stored.tied if self.stored else dict(template.all_tied_weights_keys)
        """Name of a tied tensor -> the name of the tensor that it is."""
        self.initial = InitialValues(template, seed, method.adapters, construct=lambda: self._from_config("cpu"))

    def empty_model(self, *, quantized: bool = True) -> PreTrainedModel:
        """The model with its adapters, parameters to train marked, on the meta device.

        Not `quantized`: with plain linear modules also where they would be in 4 bits.
        """
        model = self._from_config("meta")
        untie(model, set(model.all_tied_weights_keys) - set(self.tied))
        if self.method.adapters:
            with torch.device("meta"):
                inject_lora(model, self.method.adapters)
        if self.method.freeze:
            freeze(model, self.method.freeze)
        if quantized and self.method.name == "qlora":
            quantize_modules(model)
        for parameter in model.parameters():  # not the buffers: rotary tables stay in float32
            parameter.data = parameter.data.to(self.dtype)
        return model.train()

    def load(self, module: nn.Module, model: PreTrainedModel, device: torch.device, *, offload: bool = False) -> None:
        """Give memory and values to all that is left of `model` within the (sharded) meta-device `module`.

        With `offload` parameters stay on the CPU; buffers are on `device`.
        """
        _allocate(module, torch.device("cpu") if offload else device)
        for child in module.modules() if offload else ():
            child._buffers = {n: b if b is None else b.to(device) for n, b in child._buffers.items()}
        quantized = {name: m for name, m in model.named_modules() if isinstance(m, Nf4Linear)}
        eight_bits = frozen_float8(model)
        held = {f"{name}.{buffer}" for name, m in (quantized | eight_bits).items() for buffer, _ in m.named_buffers()}
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.fill({name: tensor for name, tensor in tensors.items() if name not in held})
        for name, linear in quantized.items():
            linear.fill(self.read(_base_name(f"{name}.weight", self.initial.names)))
        for name, product in eight_bits.items():  # one at a time: no rank needs room for all of them in full
            weight = torch.empty(product.weight_float8.shape, device=product.weight_float8.device)
            self.fill({f"{name}.weight": weight})
            product.quantize(weight)

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Give these tensors, plain or sharded ones, their values; names are those of the model with its adapters."""
        done = self.initial.fill_adapters(tensors) | self._fill_magnitudes(tensors)
        left = {_base_name(name, self.initial.names): t for name, t in tensors.items() if name not in done}
        if self.stored:
            filled: set[str] = set()
            for names in _one_name_each(left, self._stored_name):
                here = self.stored.fill({stored: left[name] for stored, name in names.items()})
                filled |= {names[stored] for stored in here}
            left = {name: tensor for name, tensor in left.items() if name not in filled}
        for names in _one_name_each(left, lambda name: self.tied.get(name, name)):
            missing = set(names) - self.initial.fill({own: left[name] for own, name in names.items()})
            assert not missing, f"nothing gives values to {', '.join(sorted(missing)[:3])}"

    def _fill_magnitudes(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """DoRA starts from the lengths of the base weight's rows, an embedding's columns: its update is zero, so the
        model is the base's."""
        names = {name for name in tensors if f".{MAGNITUDE}." in name}
        for name in names:
            share = Share(tensors[name])
            if not share.empty:
                assert self.initial.adapted is not None
                path = name.partition(f".{MAGNITUDE}.")[0]
                layer = cast(DoraLinearLayer, self.initial.adapted.get_submodule(name.rpartition(".")[0]))
                weight = self.read(f"{path}.weight".replace(".base_layer", ""))
                share.fill(layer.get_weight_norm(weight, lora_weight=torch.zeros(()), scaling=1))
        return names

    def read(self, name: str) -> Tensor:
        """One parameter or buffer of the model without adapters, whole, on the CPU."""
        model = self.stored.model if self.stored else self.template
        value = torch.empty_like(model.get_parameter_or_buffer(name), device="cpu", requires_grad=False)
        self.fill({name: value})
        return value

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The dtype in which the directory has a tensor of the adapted model; None where it has not just one."""
        if self.stored is None:
            return None
        conversion = self.stored.by_target.get(self._stored_name(_base_name(name, self.initial.names)))
        dtypes = {tensor.dtype for _, tensor in conversion.sources} if conversion else set()
        return dtypes.pop() if len(dtypes) == 1 else None

    def _stored_name(self, name: str) -> str:
        """The name under which a tensor of the model is in the directory: tied ones are there under one of theirs."""
        assert self.stored is not None
        source = self.tied.get(name, name)
        same = [name, source, *(other for other, of in self.tied.items() if of == source)]
        return next((n for n in same if n in self.stored.names), name)

    def _from_config(self, device: str) -> PreTrainedModel:
        with torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                self.config, dtype=torch.float32, trust_remote_code=self.source.trust_remote_code
            )
        return model


def _base_name(name: str, known: set[str]) -> str:
    """The name of a tensor in the model without adapters, which put themselves around some of its modules."""
    return name if name in known else name.replace(".base_layer", "")


def _one_name_each(names: Iterable[str], of: Callable[[str], str]) -> list[dict[str, str]]:
    """`of(name)` -> name, in as many parts as some have names: tied tensors may be apart, as on a pipeline's stages."""
    parts: list[dict[str, str]] = []
    for name in names:
        key = of(name)
        part = next((part for part in parts if key not in part), None)
        if part is None:
            parts.append(part := {})
        part[key] = name
    return parts


def _allocate(module: nn.Module, device: torch.device) -> None:
    """`module.to_empty(device)`, with what modules share still shared."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((child, name))
    module.to_empty(device=device)
    for (first, attribute), *others in places.values():
        for child, name in others:
            child._parameters[name] = first._parameters[attribute]
