"""Attention document by document against transformers' masks: values and gradients, windows and chunks too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dayzero.config import Train
from dayzero.engine import document_attention
from dayzero.engine.compiling import compile_layers
from dayzero.engine.document_attention import forget_documents, look_for_documents
from dayzero.engine.kernels import require_kernels, use_attention, use_fused_kernels
from dayzero.engine.loss import CausalLMWithLoss
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallelize import parallelize
from dayzero.engine.structure import find_layers
from dayzero.errors import ConfigError
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from tests.tiny import ARCHITECTURES

ONE = ParallelDims(strategy="none", world_size=1)
SMALL: dict[str, Any] = {"num_hidden_layers": 2}


def model_of(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**ARCHITECTURES.get(name, ARCHITECTURES["llama"]), **SMALL, **fields})
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config)


def rows(lengths: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and the positions of documents of these lengths in each row."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return torch.randint(0, 128, positions.shape, generator=torch.Generator().manual_seed(1)), positions


def loss_and_gradients(model: Any, lengths: list[list[int]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids, positions = rows(lengths)
    model.zero_grad()
    loss = CausalLMWithLoss(model)(ids, ids, positions)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CASES = [
    ("llama", {}),
    ("qwen3", {}),
    ("mixtral", {"sliding_window": 6}),  # documents longer and shorter than the window
    ("gemma2", {"model_type": "gemma2", "sliding_window": 6, "head_dim": 8, "attn_logit_softcapping": None}),
    ("opt", {}),
]


@pytest.mark.parametrize(("name", "fields"), CASES)
@pytest.mark.parametrize("lengths", [[[3, 9, 4], [16]], [[5, 1, 5, 5], [2, 2, 6, 6]], [[16], [16]]])
def test_the_loss_and_gradients_of_masked_attention(
    name: str, fields: dict[str, Any], lengths: list[list[int]]
) -> None:
    model = model_of(name, **fields)
    assert model.config._attn_implementation == "sdpa"
    want_loss, want = loss_and_gradients(model, lengths)
    assert use_attention(model, Train(max_steps=1), ONE) == "documents"
    loss, gradients = loss_and_gradients(model, lengths)
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == want.keys()
    for key, gradient in want.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_what_is_computed_again_sees_the_documents_of_the_first_time(checkpointing: str) -> None:
    """Although another model may have been called before the backward pass."""
    model = model_of("llama")
    use_attention(model, Train(max_steps=1), ONE)
    ids, positions = rows([[3, 9, 4], [16]])
    _, want = loss_and_gradients(model, [[3, 9, 4], [16]])
    train = Train(max_steps=1, activation_checkpointing=checkpointing)
    module, _, _ = parallelize(CausalLMWithLoss(model), ONE, None, train, load=lambda: None)
    model.zero_grad()
    loss = module(ids, ids, positions)
    forget_documents()
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("attention", ["sdpa", "documents"])
def test_rows_of_one_document_are_known_from_the_host(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    use_attention(model, Train(max_steps=1, attention=attention), ONE)
    looks: list[int] = []
    own = masking_utils.find_packed_sequence_indices

    def look(position_ids: torch.Tensor) -> Any:
        looks.append(len(position_ids))
        return own(position_ids)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", look)
    for lengths, expected in (([[16], [16]], 0), ([[16], [7, 9]], 1)):
        wanted = loss_and_gradients(model, lengths)
        looks.clear()
        with look_for_documents(rows(lengths)[1]):
            found = loss_and_gradients(model, lengths)
        assert len(looks) == expected
        assert masking_utils.find_packed_sequence_indices is look
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_model_that_adds_to_its_mask_keeps_it() -> None:
    """Falcon puts ALiBi into it."""
    model = model_of("falcon", model_type="falcon", alibi=True, num_kv_heads=2, new_decoder_architecture=True)
    assert use_attention(model, Train(max_steps=1), ONE) == model.config._attn_implementation == "sdpa"
    with pytest.raises(ConfigError, match="FalconForCausalLM adds to its mask itself: use auto"):
        use_attention(model, Train(max_steps=1, attention="documents"), ONE)


def test_keys_that_are_not_the_rows_tokens_are_attended_to_as_a_whole() -> None:
    """The probe for leaks then finds that documents see one another."""
    model = model_of("llama")
    use_attention(model, Train(max_steps=1), ONE)
    loss_and_gradients(model, [[3, 9, 4], [16]])
    query, key = torch.randn(2, 4, 16, 8), torch.randn(2, 2, 20, 8)
    assert document_attention._fitting(query, key[:, :, :16], None, {}) is document_attention._documents
    assert document_attention._fitting(query, key, None, {}) is None
    assert document_attention._fitting(query, key[:, :, :16], None, {"position_bias": key}) is None
    forget_documents()


def test_no_mask_is_made_for_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(document_attention, "sdpa_mask", lambda **_: made.append(1))
    model = model_of("llama")
    use_attention(model, Train(max_steps=1), ONE)
    loss_and_gradients(model, [[3, 9, 4], [16]])
    assert document_attention._documents is not None
    assert document_attention._documents.lengths == [[3, 9, 4], [16]]
    assert not made
    forget_documents()


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"attention": "flex"}, "train.attention flex trains on NVIDIA GPUs only, and torch sees none here: use auto"),
        ({"attention": "varlen"}, "train.attention varlen trains on NVIDIA GPUs only"),
        ({"kernels": "liger"}, "train.kernels liger needs an NVIDIA GPU and the package liger-kernel, but "),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_kernels_without_a_gpu(train: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        require_kernels(Train(max_steps=1, **train))


@pytest.mark.parametrize("name", ["mamba", "opt"])
def test_models_whose_attention_is_their_own(name: str) -> None:
    model = model_of(name)
    own = model.config._attn_implementation
    model.set_attn_implementation("eager") if name == "opt" else None
    train = Train(max_steps=1, attention="documents")
    if name == "opt" or own != "sdpa":
        with pytest.raises(ConfigError, match="takes the place of sdpa, but"):
            use_attention(model, train, ONE)
    assert use_attention(model, Train(max_steps=1), ONE) == model.config._attn_implementation
    assert not use_fused_kernels(model, Train(max_steps=1, kernels="none"), ONE)


def stand_in_for_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    *_: Any,
    scale: float,
    enable_gqa: bool = False,
    **__: Any,
) -> torch.Tensor:
    """What torch's kernel, which only a GPU runs, computes of q [N, H, E], k and v [N, K, E]."""
    token = torch.arange(len(q), device=q.device)
    document = torch.searchsorted(bounds, token, right=True)
    mask = (document[:, None] == document[None, :]) & (token[:, None] >= token[None, :])
    rows = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return out[0].transpose(0, 1)


def test_varlen_attention_is_compiled_into_one_graph_that_serves_any_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_attention, "varlen_attn", stand_in_for_varlen)
    model = model_of("llama")
    many = [[[3, 9, 4], [16]], [[5, 1, 5, 5], [2, 2, 6, 6]], [[8, 8], [1, 15]], [[16], [16]], [[4] * 4, [2] * 8]]
    wanted = [loss_and_gradients(model, lengths) for lengths in many]
    model.set_attn_implementation(document_attention.VARLEN)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(find_layers(model))
    for lengths, (want_loss, want) in zip(many, wanted, strict=True):
        loss, gradients = loss_and_gradients(model, lengths)
        torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
        for key, gradient in want.items():
            torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
    assert all(layer._compiled_call_impl.whole for layer in find_layers(model))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 5
