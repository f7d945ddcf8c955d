"""A model that sees what it is to predict is refused before it learns to copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dayzero.config import Method, Train
from dayzero.engine.model import ModelSource
from dayzero.engine.packing import require_causal
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallel_model import ParallelModel
from dayzero.errors import ConfigError

from tests.tiny import ARCHITECTURES

ENCODER = {
    "model_type": "bert-generation",
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def model(architecture: dict[str, Any], precision: str) -> ParallelModel:
    return ParallelModel(
        source=ModelSource(directory=None, architecture=architecture, random_weights=True),
        method=Method(name="pretrain"),
        train=Train(max_steps=1, precision=precision),  # type: ignore[arg-type]
        dims=ParallelDims(world_size=1, strategy="none"),
        seed=0,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_encoder_is_refused_and_the_same_as_a_decoder_is_not(precision: str) -> None:
    with pytest.raises(ConfigError, match=r"BertGenerationDecoder reads later tokens .*is_decoder"):
        require_causal(model(ENCODER, precision))
    require_causal(model({**ENCODER, "is_decoder": True}, precision))


@pytest.mark.parametrize("name", ["llama", "mixtral", "mamba", "gpt_oss", "opt"])
def test_causal_models_pass(name: str) -> None:
    for precision in ("fp32", "bf16"):
        require_causal(model(ARCHITECTURES[name], precision))
