"""Which architectures are walked."""

from __future__ import annotations

import re
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

OTHER_INPUTS = re.compile(r"vision|audio|text|vq")


def architectures() -> dict[str, str]:
    """model_type -> class name of every decoder-only text architecture of the installed transformers.

    Left out of its mapping of causal LMs: encoder-decoders; encoders (also in the mapping of masked LMs); and models
    of several kinds of input, whose text part has an entry of its own.
    """
    found = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        config_class = CONFIG_MAPPING[model_type]
        if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            continue
        sub_configs = getattr(config_class, "sub_configs", {})
        if any(OTHER_INPUTS.search(part) for part in sub_configs) or not _is_decoder_only(config_class):
            continue
        found[model_type] = name if isinstance(name, str) else name[0]
    return found


def _is_decoder_only(config_class: Any) -> bool:
    try:
        return not config_class().is_encoder_decoder
    except Exception:  # one that needs an encoder's config
        return False
