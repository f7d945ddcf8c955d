"""Loading a causal language model from a Hugging Face directory, with every weight of it or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dayzero.console import log
from dayzero.context_length import CONTEXT_LENGTHS, context_field
from dayzero.errors import ConfigError, DataError
from dayzero.remote_code import require_trusted_code

SHOWN = 3
"""Names of weights in a message."""


def load_config(directory: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a model directory. Raises `ConfigError` for code that may not be run."""
    require_trusted_code(directory, trust_remote_code)
    return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)


def load_causal_lm(
    directory: Path,
    what: str = "",
    model_class: Any = AutoModelForCausalLM,
    *,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """`model_class.from_pretrained(directory, **options)`; weights that it has no use for are a warning.

    With a `state_dict` among the options, the directory is only named: nothing is read from it.

    Raises `DataError`, naming `what` (default: the directory), where the stored weights lack some of the model's or
    have another shape: transformers itself would put random values there and go on. Raises `ConfigError` for code that
    may not be run.
    """
    what = what or str(directory)
    if "state_dict" not in options:
        require_trusted_code(directory, trust_remote_code, what)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # its own report is a table of many lines
    try:
        loaded: Any = model_class.from_pretrained(
            None if "state_dict" in options else directory,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            **options,
        )
    finally:
        transformers.logging.set_verbosity(verbosity)
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise DataError(
            f"{what}: its weights lack {_some(missing)}, which its config.json asks for: get the model's complete files"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise DataError(
            f"{what}: its weights {_some([m[0] for m in mismatched])} do not fit its config.json ({name} is "
            f"{list(stored)}, the config says {list(wanted)}): get weights and config of the same model"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        log.warning("WARNING: %s: %s has no place for the weights %s", what, type(model).__name__, _some(unexpected))
    return model


def require_causal_lm(config: PretrainedConfig, what: str) -> None:
    """Raise `ConfigError`, naming `what`, for the config of a model that does not generate text from left to right."""
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise ConfigError(
            f"{what}: model_type {config.model_type!r} is not a causal language model: choose one that generates text"
        )


def context_length(config: PretrainedConfig) -> int | None:
    """The longest sequence in tokens that the model takes by its config; None where that names none."""
    text = config.get_text_config(decoder=True)
    field = context_field({name: getattr(text, name, None) for name in CONTEXT_LENGTHS})
    return field[1] if field else None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
