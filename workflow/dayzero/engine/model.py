"""Building a Hugging Face causal LM: an empty one on the meta device on every rank, the weights on rank 0 only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dayzero.config import Method
from dayzero.engine.distributed import rank
from dayzero.engine.lora import inject_lora
from dayzero.errors import ConfigError
from dayzero.pretrained import load_causal_lm, require_causal_lm


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model's shape and weights come from."""

    directory: Path | None
    """A Hugging Face directory, for its config and (unless `random_weights`) its weights."""
    architecture: dict[str, Any] | None = None
    """Fields of a config for a model without a directory."""
    random_weights: bool = False
    trust_remote_code: bool = False

    def config(self, tokenizer_directory: Path | None = None) -> PretrainedConfig:
        """The model's config; one from `architecture` takes vocabulary and special ids from the tokenizer.

        Raises `ConfigError` for a directory without a model, a model that is not a causal LM, an unknown model_type or
        field.
        """
        if self.directory is not None:
            if not (self.directory / "config.json").is_file():
                raise ConfigError(f"{self.directory} holds no model (no config.json): run the fetch_model stage first")
            config = AutoConfig.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)
            require_causal_lm(config, str(self.directory))
        else:
            config = _config_from_fields(self.architecture or {}, tokenizer_directory)
        config.use_cache = False  # a cache in training costs memory, and packed documents would see one another
        return config


def build_model(
    source: ModelSource, config: PretrainedConfig, method: Method, seed: int, *, meta: bool
) -> PreTrainedModel:
    """The model in float32 with its adapters, parameters to train marked; on the meta device without any values.

    With values it is the same for the same seed, however many ranks there are. Raises `DataError` where a directory
    lacks some of its weights.
    """
    torch.manual_seed(seed)
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": source.trust_remote_code}
    if meta:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options)
    elif source.random_weights or source.directory is None:
        model = AutoModelForCausalLM.from_config(config, **options)
    else:
        model = load_causal_lm(source.directory, config=config, **options)
    if method.name == "lora":
        torch.manual_seed(seed)
        with torch.device("meta" if meta else "cpu"):
            inject_lora(model, method.lora)
    return model.train()


def load_weights(
    module: nn.Module,
    model: PreTrainedModel,
    values: PreTrainedModel | None,
    device: torch.device,
    *,
    in_parts: bool = False,
) -> None:
    """Give the (sharded) meta-device `module` around `model` memory and the values that rank 0 holds in `values`.

    Buffers are sent too: those that are not in a checkpoint, such as rotary frequencies, are garbage after `to_empty`.
    With `in_parts` each rank's model has only some of the parameters.
    """
    assert (values is not None) == (rank() == 0)
    module.to_empty(device=device)
    if in_parts:
        _load_parts(model, values)
        return
    model.tie_weights()
    prefix = next(name for name, child in module.named_modules() if child is model)
    state = {f"{prefix}.{name}": tensor for name, tensor in values.state_dict().items()} if values is not None else {}
    set_model_state_dict(
        module, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
    )
    buffers = dict(values.named_buffers()) if values is not None else {}
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if values is not None:
                buffer.copy_(buffers[name])
            if dist.is_initialized():
                dist.broadcast(buffer, src=0)


@torch.no_grad()
def _load_parts(model: PreTrainedModel, values: PreTrainedModel | None) -> None:
    """Send every tensor to all ranks, one at a time; each keeps its share of those that its part of `model` has."""
    here = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    all_values: dict[str, torch.Tensor] = {}
    if values is not None:
        all_values = {**dict(values.named_buffers()), **dict(values.named_parameters(remove_duplicate=False))}
    listed = [[(name, tensor.shape, tensor.dtype) for name, tensor in all_values.items()]]
    dist.broadcast_object_list(listed, src=0)
    for name, shape, dtype in listed[0]:
        place = here.get(name)
        device = next(iter(here.values())).device
        whole = all_values[name].to(device) if all_values else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(whole.detach(), src=0)
        if isinstance(place, DTensor):
            share = distribute_tensor(whole.detach(), place.device_mesh, place.placements, src_data_rank=None)
            place.to_local().copy_(share.to_local())
        elif place is not None:
            place.copy_(whole)


def share_weights(module: nn.Module, owner: nn.Module) -> None:
    """Let the meta-device `module` use the parameters and buffers of the equally sharded `owner`; nothing is copied."""
    module.load_state_dict(owner.state_dict(), assign=True)
    for name, buffer in owner.named_buffers():  # also those that are not in a state dict
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent)._buffers[leaf] = buffer


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, shared ones once, shards counted whole."""
    trainable = total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


def _config_from_fields(fields: dict[str, Any], tokenizer_directory: Path | None) -> PretrainedConfig:
    from transformers import AutoTokenizer

    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ConfigError("model.architecture has no model_type: name one, e.g. model_type: llama")
    if tokenizer_directory is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
        fields.setdefault("vocab_size", len(tokenizer))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            fields.setdefault(name, getattr(tokenizer, name))
        if fields["vocab_size"] < len(tokenizer):
            raise ConfigError(
                f"model.architecture.vocab_size {fields['vocab_size']} is smaller than the tokenizer's "
                f"{len(tokenizer)}: leave it out or raise it"
            )
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # each config class has its own checks, with their own errors
        if model_type not in CONFIG_MAPPING:
            hint = _did_you_mean(model_type, CONFIG_MAPPING) or ": give a model_type that transformers has"
            raise ConfigError(f"model.architecture.model_type {model_type!r} is unknown{hint}") from error
        said = " ".join(str(error).split())[:300]
        raise ConfigError(f"model.architecture: {model_type} cannot have these values: {said}") from error
    require_causal_lm(config, "model.architecture")
    known = {*type(config)().to_dict(), *config.attribute_map}
    if unknown := sorted(set(fields) - known):
        named = ", ".join(name + _did_you_mean(name, known) for name in unknown)
        raise ConfigError(f"model.architecture: {model_type} has no field {named}: see its transformers config")
    return config


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
