"""What surrounds a model's passes, forwards and backwards."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from dayzero.config import Method, Train
from dayzero.engine import passes
from dayzero.engine.model import ModelSource
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.sdpa_order import sdpa_order
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.tiny import ARCHITECTURES, VOCAB_SIZE


def model_with(setting: Any) -> ParallelModel:
    return ParallelModel(
        source=ModelSource(directory=None, architecture=ARCHITECTURES["llama"], random_weights=True),
        method=Method(name="pretrain"),
        train=Train(max_steps=1, precision="fp32", attention="sdpa", activation_checkpointing=setting),
        dims=ParallelDims(world_size=1, strategy="none"),
        seed=0,
        device=torch.device("cpu"),
    )


def gradients(model: ParallelModel) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(0))
    places = torch.arange(24).expand(2, -1)
    rows = {"input_ids": ids, "labels": ids, "position_ids": places, "lengths": torch.tensor([24, 24])}
    passes.backward(model, [rows, rows], 1.0, 0.0)
    return {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("setting", ["full", "selective", "every_2"])
def test_what_is_computed_again_comes_from_the_kernel_that_was_there_first(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's plain kernel, which a CPU asks last, stands in for cuDNN's."""

    def last(*_: Any, **__: Any) -> AbstractContextManager[None]:
        return sdpa_kernel(SDPBackend.MATH)

    monkeypatch.setattr(passes, "sdpa_order", last)
    expected = gradients(model_with("none"))
    found = gradients(model_with(setting))
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7)


def test_cudnn_is_asked_for_rows_of_lengths_that_come_again() -> None:
    cuda = torch.device("cuda")
    for tokens, by_documents, asked in ((4096, False, True), (4096, True, False), (4097, False, False)):
        with sdpa_order(cuda, tokens, by_documents=by_documents):
            assert torch.backends.cuda.cudnn_sdp_enabled() == asked
            assert torch.backends.cuda.flash_sdp_enabled()
            assert torch.backends.cuda.math_sdp_enabled()
