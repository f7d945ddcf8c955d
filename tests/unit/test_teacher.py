"""A teacher as the engine builds it: how it attends, and what is asked of it before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dayzero.config import Method, Train
from dayzero.engine.document_attention import DOCUMENTS
from dayzero.engine.model import ModelSource
from dayzero.engine.packing import any_leak, require_causal
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.passes import teacher_logits
from dayzero.engine.tiny_copy import tiny_configs
from dayzero.errors import ConfigError
from transformers import CONFIG_MAPPING

from tests.tiny import ARCHITECTURES

LENGTHS = (9, 5, 10)
ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def sparse(vocab_size: int) -> dict[str, Any]:
    """Attention to 2,048 chosen tokens of all documents: all of a short row's, where nothing leaks."""
    config = next(tiny_configs(CONFIG_MAPPING["glm_moe_dsa"]()))
    config.update({"index_topk": 2048, "num_key_value_heads": config.num_attention_heads, "vocab_size": vocab_size})
    return config.to_dict()


def student_of(teacher: dict[str, Any], **train: Any) -> ParallelModel:
    return ParallelModel(
        source=ModelSource(directory=None, architecture=ARCHITECTURES["qwen3"], random_weights=True),
        teacher=ModelSource(directory=None, architecture=teacher, random_weights=True),
        method=Method(name="kd"),
        train=Train(max_steps=1, **train),
        dims=ParallelDims(world_size=1, strategy="none"),
        seed=0,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_attends_to_one_document_after_the_other_as_its_student(precision: str) -> None:
    """No mask over whole rows is made, whatever the student's `train.attention`; the logits are those under a mask."""
    rows = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    for attention in ("auto", "sdpa"):
        model = student_of(ARCHITECTURES["llama"], attention=attention, precision=precision)
        assert model.distillation is not None
        teacher = model.distillation.teacher
        assert teacher.attention == "documents"
        assert teacher.model.config._attn_implementation == DOCUMENTS
        found = teacher_logits(model, rows, rows)
        teacher.model.set_attn_implementation("sdpa")
        expected = teacher_logits(model, rows, rows)
        tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision]
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_teacher_that_reads_ahead_is_refused() -> None:
    require_causal(student_of(ARCHITECTURES["llama"]))
    encoder = {"model_type": "bert-generation", **ENCODER, "vocab_size": ARCHITECTURES["qwen3"]["vocab_size"]}
    with pytest.raises(ConfigError, match=r"^method.kd.teacher: BertGenerationDecoder reads later tokens .*is_decoder"):
        require_causal(student_of(encoder))


def test_a_teacher_that_leaks_on_long_rows_only_is_found() -> None:
    assert any_leak(student_of(ARCHITECTURES["llama"], precision="fp32")) is None
    leak = any_leak(student_of(sparse(ARCHITECTURES["qwen3"]["vocab_size"]), precision="fp32"))
    assert leak is not None
    assert leak > 1e-3
