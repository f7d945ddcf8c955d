"""A teacher beside the labels: against plain formulas over whole logits, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dayzero.config import Kd
from dayzero.data.tokenizer import check_same_tokens
from dayzero.engine.chunks import IGNORE
from dayzero.engine.distillation import Distillation, Teacher, check_vocabularies
from dayzero.engine.loss import CausalLMWithLoss, LossOptions
from dayzero.errors import ConfigError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny import ARCHITECTURES, VOCAB_SIZE
from tests.tiny_tokenizer import tiny_tokenizer


def tiny(name: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    fields = {**ARCHITECTURES[name], "initializer_range": 0.3, **fields}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(0, VOCAB_SIZE, (3, 17))
    labels = torch.where(torch.rand(3, 17) < 0.4, torch.randint(0, VOCAB_SIZE, (3, 17)), IGNORE)
    return input_ids, labels, torch.arange(17).expand(3, 17)


def with_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel, **kd: float
) -> tuple[CausalLMWithLoss, Distillation]:
    distillation = Distillation(Teacher(teacher).eval(), Kd(**kd))
    module = CausalLMWithLoss(student, loss=distillation.loss, options=LossOptions(chunk_size=3))
    return module.train(), distillation


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_are_those_of_whole_logits(temperature: float) -> None:
    student, teacher = tiny("qwen3"), tiny("llama", seed=5, hidden_size=48)  # another width, the same vocabulary
    input_ids, labels, position_ids = batch()
    at = labels != IGNORE
    logits = student(input_ids=input_ids, position_ids=position_ids).logits[at]
    with torch.no_grad():
        taught = teacher(input_ids=input_ids, position_ids=position_ids).logits[at]
    p, q = ((x.double() / temperature).softmax(-1) for x in (taught, logits))
    kl = temperature**2 * (p * (p.log() - q.log())).sum()
    expected = F.cross_entropy(logits, labels[at], reduction="sum") + 0.3 * kl
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    module, distillation = with_teacher(student, teacher, temperature=temperature, weight=0.3)
    loss = module(input_ids, labels, position_ids)
    loss.backward()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    assert distillation.take_sum() == pytest.approx(kl.item(), rel=1e-5)
    assert distillation.take_sum() == 0.0
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_that_is_the_student_has_nothing_to_teach() -> None:
    student, input_ids, labels, position_ids = tiny("qwen3"), *batch()
    module, distillation = with_teacher(student, tiny("qwen3"), temperature=2.0)
    loss = module(input_ids, labels, position_ids)
    assert distillation.take_sum() == 0.0
    plain = CausalLMWithLoss(student, options=LossOptions(chunk_size=3)).train()(input_ids, labels, position_ids)
    assert torch.equal(loss, plain)
    # nor has a validation loss a teacher
    module, distillation = with_teacher(student, tiny("llama"))
    assert torch.equal(module.eval()(input_ids, labels, position_ids), plain)
    assert distillation.take_sum() == 0.0


def test_rows_without_labels() -> None:
    student, input_ids, labels, position_ids = tiny("qwen3"), *batch()
    module, _ = with_teacher(student, tiny("llama"))
    loss = module(input_ids, torch.full_like(labels, IGNORE), position_ids)
    loss.backward()
    assert loss.item() == 0.0
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_another_vocabulary_or_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="teacher big: its vocabulary has 160 entries, the model's 128: use a teacher"
    ):
        check_vocabularies(tiny("llama"), tiny("llama", vocab_size=160), "big")
    tiny_tokenizer(tmp_path / "a")
    tiny_tokenizer(tmp_path / "b")
    check_same_tokens(tmp_path / "a", tmp_path / "b", "b")
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tmp_path / "b")
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "b")
    with pytest.raises(
        ConfigError, match=r"teacher b: its tokenizer is another one \(\d+ tokens here, .*'<new>'"
    ) as refused:
        check_same_tokens(tmp_path / "a", tmp_path / "b", "b")
    assert "\n" not in str(refused.value)
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="teacher none: it has no tokenizer that loads"):
        check_same_tokens(tmp_path / "a", tmp_path / "none", "none")
