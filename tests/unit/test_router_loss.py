"""The auxiliary loss of each row is transformers' own; models that have none are refused."""

from __future__ import annotations

import sys

import pytest
import torch
from dayzero.config import Method
from dayzero.engine.loss import CausalLMWithLoss, LossOptions
from dayzero.engine.loss_choice import LOSSES
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.router_loss import RouterLoss, load_balancing_loss, router_loss_coefficient
from dayzero.errors import ConfigError
from transformers import PreTrainedModel

from tests.tiny import ARCHITECTURES

ONE = ParallelDims(strategy="none", world_size=1)
ON = {"output_router_logits": True, "router_aux_loss_coef": 0.1}


def model_of(name: str, *, meta: bool = False, **changed) -> PreTrainedModel:
    source = ModelSource(directory=None, architecture={**ARCHITECTURES[name], **changed}, random_weights=True)
    return build_model(source, source.config(), Method(name="full"), seed=0, meta=meta)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_each_row_has_the_loss_that_transformers_gives_it(name: str) -> None:
    function = sys.modules[type(model_of(name, meta=True)).__module__].load_balancing_loss_func
    torch.manual_seed(0)
    logits = tuple(torch.randn(3 * 7, 6, requires_grad=True) for _ in range(4))
    real = torch.arange(7) < torch.tensor([[7], [4], [1]])
    rows = load_balancing_loss(logits, real, top_k=2)
    for b in range(3):
        of_row = tuple(x.view(3, 7, 6)[b] for x in logits)
        torch.testing.assert_close(rows[b], function(of_row, 6, 2, real[b : b + 1]), rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(rows.sum(), logits)
    assert all(g.abs().sum() > 0 for g in gradients)
    assert all(g.view(3, 7, 6)[~real].abs().sum() == 0 for g in gradients)


def test_a_row_of_padding_has_no_loss_and_no_nan() -> None:
    loss = load_balancing_loss((torch.randn(8, 4, requires_grad=True),), torch.zeros(2, 4, dtype=torch.bool), 2)
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()


@pytest.mark.parametrize("loss", ["chunked", "cross_entropy"])
def test_the_sum_of_the_rows_is_added_once(loss: str) -> None:
    model = model_of("mixtral")
    module = CausalLMWithLoss(
        model, loss=LOSSES[loss], options=LossOptions(chunk_size=5), router_loss=RouterLoss(model, None)
    )
    torch.manual_seed(1)
    input_ids = torch.randint(0, 128, (2, 9))
    real = torch.arange(9) < torch.tensor([[9], [5]])
    labels = torch.where(real, input_ids, -100)
    batch = input_ids, labels, torch.arange(9).expand(2, 9)
    plain = module(*batch)
    assert module.router_loss is not None
    with_router = module(*batch, real, 10.0)
    rows = sum(
        model(input_ids=input_ids[b : b + 1, :n], output_router_logits=True).aux_loss for b, n in enumerate((9, 5))
    )
    torch.testing.assert_close(with_router - plain, 10.0 * rows, rtol=1e-4, atol=0)
    assert module.router_loss.take_sum() == pytest.approx(rows.item(), rel=1e-5)
    assert module.router_loss.take_sum() == 0.0


def test_the_coefficient_is_the_models_own_unless_set() -> None:
    mixtral, qwen = model_of("mixtral", meta=True, **ON), model_of("qwen3_moe", meta=True)
    assert router_loss_coefficient(mixtral, None, ONE) == 0.1
    assert router_loss_coefficient(mixtral, 0, ONE) == 0
    assert router_loss_coefficient(qwen, None, ONE) == 0  # its config does not turn router logits on
    assert router_loss_coefficient(qwen, 0.01, ONE) == 0.01
    assert router_loss_coefficient(model_of("llama", meta=True), None, ONE) == 0
    assert router_loss_coefficient(model_of("llama", meta=True), 0, ONE) == 0


def test_a_coefficient_for_a_model_without_router_logits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef 0.01: LlamaForCausalLM defines no load balancing"):
        router_loss_coefficient(model_of("llama", meta=True), 0.01, ONE)


def test_a_mesh_on_which_no_rank_sees_all_router_logits_is_refused() -> None:
    dims = ParallelDims(strategy="fsdp2", world_size=2, tp=2, sequence_parallel=True)
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef 0.1: with sequence_parallel no rank has the router"):
        router_loss_coefficient(model_of("mixtral", meta=True, **ON), None, dims)
    assert router_loss_coefficient(model_of("mixtral", meta=True), None, dims) == 0
