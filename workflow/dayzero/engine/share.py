"""Which part of a whole tensor this rank holds, whatever its placements: asked of DTensor, not computed here."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


class Share:
    """The rank's part of `tensor`: all of a plain one, of a DTensor what its mesh and placements leave here.

    Every placement splits one dim (in equal or uneven, contiguous or strided pieces), so the part is a product of index
    lists. Each list is what DTensor itself makes of the numbers 0, 1, ... n under the same placements.
    """

    @torch.no_grad()
    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        self.local = tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        self.indices: dict[int, Tensor] = {}
        """dim -> the whole tensor's indices along it that are here, where that is not all of them."""
        if not isinstance(tensor, DTensor):
            return
        dims = [getattr(placement, "dim", None) for placement in tensor.placements]
        assert all(d is not None or p.is_replicate() for d, p in zip(dims, tensor.placements, strict=True)), tensor
        for dim in {d % tensor.ndim for d in dims if d is not None}:
            along = [
                placement if d is not None and d % tensor.ndim == dim else Replicate()
                for d, placement in zip(dims, tensor.placements, strict=True)
            ]
            numbers = torch.arange(tensor.shape[dim], device=tensor.device_mesh.device_type)
            numbers = numbers.view([-1 if d == dim else 1 for d in range(tensor.ndim)])
            local = distribute_tensor(numbers, tensor.device_mesh, along, src_data_rank=None).to_local()
            self.indices[dim] = local.flatten().cpu()
        held = tuple(len(self.indices[d]) if d in self.indices else n for d, n in enumerate(tensor.shape))
        assert held == tuple(self.local.shape) or self.local.numel() == 0, f"{held} is not {tuple(self.local.shape)}"

    @property
    def empty(self) -> bool:
        """Whether nothing is here."""
        return self.local.numel() == 0

    def rows(self, size: int) -> list[tuple[int, int]]:
        """Runs (start, stop) of the whole tensor's `size` rows of dim 0, in the order in which they lie here."""
        if 0 not in self.indices:
            return [(0, size)] if size else []
        runs: list[tuple[int, int]] = []
        for row in self.indices[0].tolist():
            if runs and runs[-1][1] == row:
                runs[-1] = (runs[-1][0], row + 1)
            else:
                runs.append((row, row + 1))
        return runs

    def cut(self, whole: Tensor, *, first_dim: int = 0) -> Tensor:
        """The part of `whole`, of which the dims before `first_dim` are cut already."""
        for dim, index in self.indices.items():
            if dim >= first_dim:
                start, length = int(index[0]) if len(index) else 0, len(index)
                run = torch.equal(index, torch.arange(start, start + length))
                whole = whole.narrow(dim, start, length) if run else whole.index_select(dim, index)
        return whole

    @torch.no_grad()
    def fill(self, whole: Tensor) -> None:
        """Copy the rank's part of `whole` into its memory."""
        assert whole.shape == self.shape, f"{tuple(whole.shape)} given for {tuple(self.shape)}"
        if not self.empty:
            self.local.copy_(self.cut(whole))
