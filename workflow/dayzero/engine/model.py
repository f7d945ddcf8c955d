"""Which Hugging Face causal LM is trained: its config from a directory or from fields, and the model in one process."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from dayzero.config import Method
from dayzero.engine.float8 import frozen_float8
from dayzero.engine.quantized import Nf4Linear
from dayzero.engine.weights import Weights
from dayzero.errors import ConfigError, short
from dayzero.pretrained import load_config, require_causal_lm
from dayzero.remote_code import require_trusted_code


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

        Raises `ConfigError` for a directory without a model, a model that is not a causal LM, code of its own that may
        not be run, an unknown model_type or field.
        """
        if self.directory is not None:
            if not (self.directory / "config.json").is_file():
                raise ConfigError(f"{self.directory} holds no model (no config.json): run the fetch_model stage first")
            config = load_config(self.directory, self.trust_remote_code)
            require_causal_lm(config, str(self.directory))
        else:
            config = _config_from_fields(self.architecture or {}, tokenizer_directory, self.trust_remote_code)
        config.use_cache = False  # a cache in training costs memory, and packed documents would see one another
        return config


def build_model(
    source: ModelSource, config: PretrainedConfig, method: Method, seed: int, *, meta: bool
) -> PreTrainedModel:
    """The model in float32 with its adapters, parameters to train marked; on the meta device without any values.

    With values, whole on the CPU, it is what any mesh starts from. Raises `DataError` where a directory lacks some of
    its weights.
    """
    weights = Weights(source, config, method, seed)
    model = weights.empty_model()
    if not meta:
        weights.load(model, model, torch.device("cpu"))
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, shared ones once, shards counted whole."""
    total = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, Nf4Linear))
    trainable = 0
    for parameter in model.parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    total += sum(m.weight_float8.numel() for m in frozen_float8(model).values())
    return trainable, total


def _config_from_fields(
    fields: dict[str, Any], tokenizer_directory: Path | None, trust_remote_code: bool
) -> PretrainedConfig:
    from transformers import AutoTokenizer

    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ConfigError("model.architecture has no model_type: name one, e.g. model_type: llama")
    if tokenizer_directory is not None:
        require_trusted_code(tokenizer_directory, trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory, trust_remote_code=trust_remote_code)
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
        raise ConfigError(f"model.architecture: {model_type} cannot have these values: {short(error, 300)}") from error
    require_causal_lm(config, "model.architecture")
    known = {*type(config)().to_dict(), *config.attribute_map}
    if unknown := sorted(set(fields) - known):
        named = ", ".join(name + _did_you_mean(name, known) for name in unknown)
        raise ConfigError(f"model.architecture: {model_type} has no field {named}: see its transformers config")
    return config


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
