"""What the probe for leaks tells apart: rounding of single tokens, and documents that notice one another."""

from __future__ import annotations

import torch
from dayzero.engine.packing import LENGTHS, packing_leak
from torch import Tensor
from torch.nn.functional import one_hot


def rounds_by_place(input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """[B, T, 8] of each token by itself, but for the second of a document, which is rounded by where it lies: so does a
    sum over ranks that is made piece by piece."""
    place = torch.arange(input_ids.numel()).view_as(input_ids)
    rounded = (position_ids == 1) & (place >= 30)
    return one_hot(input_ids % 8, 8) + 4e-4 * rounded.unsqueeze(-1)


def notices_others(input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """The same, and the first token of a document knows whether it is alone in its row."""
    shared = ((position_ids == 0).sum(dim=1, keepdim=True) > 1) & (position_ids == 0)
    return rounds_by_place(input_ids, position_ids) + 1e-3 * shared.unsqueeze(-1)


def test_a_token_that_amplifies_rounding_is_no_leak() -> None:
    assert sum(LENGTHS[:3]) + 1 >= 30, "the last document's second token is one that is rounded"
    assert packing_leak(rounds_by_place, 64, "fp32") is None


def test_a_document_that_notices_others_is_a_leak() -> None:
    leak = packing_leak(notices_others, 64, "fp32")
    assert leak is not None
    assert 9e-4 < leak < 1.1e-3
