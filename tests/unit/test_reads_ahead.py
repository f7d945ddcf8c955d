"""A model that sees what it is to predict is refused before it learns to copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dayzero.config import Method, Train
from dayzero.engine.model import ModelSource
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.trainer import Trainer
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


def trainer(architecture: dict[str, Any], folder: Path, precision: str) -> Trainer:
    return Trainer(
        source=ModelSource(directory=None, architecture=architecture, random_weights=True),
        tokenizer_directory=None,
        method=Method(name="pretrain"),
        train=Train(max_steps=1, precision=precision),  # type: ignore[arg-type]
        dims=ParallelDims(world_size=1, strategy="none"),
        seed=0,
        device=torch.device("cpu"),
        directory=folder,
        identity={},
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_encoder_is_refused_and_the_same_as_a_decoder_is_not(precision: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"BertGenerationDecoder reads later tokens .*is_decoder"):
        trainer(ENCODER, tmp_path, precision).require_causal()
    trainer({**ENCODER, "is_decoder": True}, tmp_path, precision).require_causal()


@pytest.mark.parametrize("name", ["llama", "mixtral", "mamba", "gpt_oss", "opt"])
def test_causal_models_pass(name: str, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        trainer(ARCHITECTURES[name], tmp_path, precision).require_causal()
