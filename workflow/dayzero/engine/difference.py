"""How far a tensor is from what it should be."""

from __future__ import annotations

from torch import Tensor


def relative_difference(found: Tensor, reference: Tensor, floor: float = 1e-6) -> float:
    """Largest absolute difference as a share of the reference's largest absolute value, or of `floor` where that is
    more; infinite for NaN and for another shape, so that no bound holds."""
    if found.shape != reference.shape:
        return float("inf")
    off = ((found - reference).abs().max() / reference.abs().max().clamp(min=floor)).item()
    return off if off == off else float("inf")
