"""What training left behind, tensor by tensor: a checkpoint's weights, or the base model's with the adapters added."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path
from typing import cast

import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dayzero.config import Method
from dayzero.engine.freeze import frozen_names
from dayzero.engine.initial_values import memory_for
from dayzero.engine.lora import ADAPTER, stored_name
from dayzero.engine.model import ModelSource
from dayzero.engine.quantized import Nf4Linear, rounded_nf4
from dayzero.engine.weights import Weights
from dayzero.errors import ConfigError
from dayzero.files import read_json
from dayzero.safetensors_file import read_header


class TrainedWeights:
    """The tensors of the trained model, read one at a time; those of the untouched model where `train` is None.

    `train` is the train stage's folder, with `adapter/` for LoRA and its last checkpoint for other methods. With `ema`
    it is the average of the weights that training kept. `dtype` is the one in which training kept weights: what it
    did not train is rounded to it, or to 4 bits, as it was there. Raises `ConfigError` where that stage has not
    finished, or its checkpoint is another model's.
    """

    def __init__(
        self,
        source: ModelSource,
        tokenizer: Path | None,
        method: Method,
        seed: int,
        train: Path | None,
        *,
        dtype: torch.dtype = torch.float32,
        ema: bool = False,
    ) -> None:
        if train is not None and not (train / "summary.json").is_file():
            raise ConfigError(f"--train {train} has no summary.json: finish the train stage first")
        self.weights = Weights(source, source.config(tokenizer), Method(name="none"), seed)
        self.model = copy.deepcopy(self.weights.stored.model if self.weights.stored else self.weights.template)
        """The whole model on the meta device, as transformers loads or builds it."""
        self.parameters = {name for name, _ in self.weights.template.named_parameters(remove_duplicate=False)}
        """Names; what else there is are buffers, which training keeps in float32."""
        self.dtype = dtype if train is not None else torch.float32
        self.quantized: set[str] = set()
        """Weights that were trained upon in 4 bits."""
        if train is not None and method.name == "qlora":
            trained = Weights(source, self.weights.config, method, seed).empty_model()
            names = {n for n, m in trained.named_modules() if isinstance(m, Nf4Linear)}
            self.quantized = {f"{name}.weight".replace(".base_layer", "") for name in names}
        self.checkpoint: _Checkpoint | None = None
        self.adapters: _Adapters | None = None
        if train is not None and method.adapters:
            self.adapters = _Adapters(train / ("adapter_ema" if ema else "adapter"), self.weights)
        elif train is not None:
            self.checkpoint = _Checkpoint(
                train / read_json(train / "summary.json")["checkpoint"], "ema" if ema else "model"
            )
            # the template's: some constructors freeze parameters, and loading thaws them
            names = {name for name, parameter in self.weights.template.named_parameters() if parameter.requires_grad}
            names -= frozen_names(self.model, method.freeze)
            if missing := sorted(name for name in names if self._in_checkpoint(name) is None):
                raise ConfigError(
                    f"--train: {self.checkpoint.path} lacks {', '.join(missing[:3])}: it is a checkpoint of another "
                    "model: give this run's own train folder, or remove it and train again"
                )

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """A parameter or buffer by the model's own name, whole, on the CPU; parameters are float32."""
        if saved := self._in_checkpoint(name):
            assert self.checkpoint is not None
            return self.checkpoint.read(saved)
        if self.adapters and (whole := next((n for n in self._same(name) if n in self.adapters.whole), None)):
            return self.adapters.whole[whole].read().float()
        value = self.weights.read(name)
        if name in self.quantized:
            value = rounded_nf4(value)
        elif name in self.parameters:
            value = value.to(self.dtype).float()
        return self.adapters.add(name, value) if self.adapters else value

    def _same(self, name: str) -> tuple[str, ...]:
        """The names of the tensor that is called `name`: several where it is tied."""
        source = self.weights.tied.get(name, name)
        return (name, source, *(other for other, of in self.weights.tied.items() if of == source))

    def _in_checkpoint(self, name: str) -> str | None:
        if self.checkpoint is None:
            return None
        return next((n for n in self._same(name) if n in self.checkpoint.saved), None)


class _Checkpoint:
    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind
        metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        self.saved = {
            name.removeprefix(f"{kind}.model."): entry
            for name, entry in metadata.items()
            if name.startswith(f"{kind}.model.") and isinstance(entry, TensorStorageMetadata)
        }

    def read(self, name: str) -> Tensor:
        entry = self.saved[name]
        value = torch.empty(entry.size, dtype=entry.properties.dtype)
        dcp.load({self.kind: {f"model.{name}": value}}, checkpoint_id=self.path, no_dist=True)
        return value


class _Adapters:
    """PEFT's own layers around an empty model: one at a time gets memory, its adapter's values, and is merged."""

    def __init__(self, directory: Path, weights: Weights) -> None:
        self.model = copy.deepcopy(weights.template)
        config = LoraConfig.from_pretrained(str(directory))
        config.modules_to_save = None  # they are read as they are
        config.ensure_weight_tying = False
        with torch.device("meta"):
            inject_adapter_in_model(config, self.model, adapter_name=ADAPTER)
        self.stored = {t.name: t for t in read_header(directory / "adapter_model.safetensors")}
        self.whole = {n.removeprefix("base_model.model."): t for n, t in self.stored.items() if ".lora_" not in n}
        """Parameters trained whole, by the model's own names."""
        self.layers: dict[str, list[str]] = defaultdict(list)
        """Name of a weight in the plain model -> the adapted modules around it, inner ones first."""
        for path, module in reversed(list(self.model.named_modules(remove_duplicate=False))):
            if isinstance(module, LoraLayer):
                plain = path.replace(".base_layer", "")
                self.layers[f"{plain}.{getattr(module, 'parameter_name', 'weight')}"].append(path)

    def add(self, name: str, value: Tensor) -> Tensor:
        for path in self.layers.get(name, ()):
            layer = cast(LoraLayer, self.model.get_submodule(path))
            weight = _name_of(self.model, layer.get_base_layer(), name.rpartition(".")[2])
            parts = [part for part in layer.adapter_layer_names if hasattr(layer, part)]
            adapters = [f"{path}.{p}.{n}" for p in parts for n, _ in getattr(layer, p).named_parameters()]
            with memory_for(self.model, (weight, *adapters), {weight: value}) as memory:
                for adapter in adapters:
                    stored = self.stored[stored_name(adapter)]
                    memory[adapter].copy_(stored.read())
                layer.merge()
                value = memory[weight].data
            layer.merged_adapters.clear()
        return value


def _name_of(model: nn.Module, module: nn.Module, attribute: str) -> str:
    """The full name of a parameter in its own `module`: a tied one is in others too."""
    return next(f"{n}.{attribute}" for n, m in model.named_modules(remove_duplicate=False) if m is module)
