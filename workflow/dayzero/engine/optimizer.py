"""The optimizer, its parameter groups, and the gradient norm."""

from __future__ import annotations

from collections.abc import Iterable, Set

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dayzero.config import Optimizer as OptimizerConfig


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, copies: Set[int] = frozenset()
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, matrices decayed and the rest not.

    `copies`: ids of parameters that are copies of an embedding on another rank, and treated like it. The fused kernel
    runs on CPU and CUDA, over DTensors too, and is deterministic.
    """
    decay, no_decay = decay_groups(model, copies)
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def decay_groups(model: nn.Module, copies: Set[int] = frozenset()) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters to decay (matrices) and not to (biases, norms, embeddings), in module order."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    embeddings |= copies
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (no_decay if parameter.ndim < 2 or id(parameter) in embeddings else decay).append(parameter)
    return decay, no_decay


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    *,
    copies: Set[int] = frozenset(),
    across: dist.ProcessGroup | None = None,
) -> float:
    """Scale all gradients so that their global L2 norm, over every rank's shards, is at most `max_norm`.

    Returns the norm before clipping. `max_norm` 0 only measures. The ranks of `across` hold different parameters;
    `copies` are the ids of those here that another of them holds too and counts.
    """
    owned = [(id(p), p.grad) for p in parameters if p.grad is not None]
    # gradients on different meshes (split by tp as well, or not) cannot be stacked: one norm for each mesh
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for key, grad in owned:
        if key not in copies:
            by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
    norms = [torch.nn.utils.get_total_norm(group, norm_type=2.0) for group in by_mesh.values()]
    if not norms and across is None:
        return 0.0
    total = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm() if norms else None
    if across is not None:
        total = _root_of_sum_of_squares(total, across)
    assert total is not None
    if max_norm > 0:
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for _, grad in owned:
            grad.mul_(scale)
    return total.item()


def _root_of_sum_of_squares(norm: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    squared = torch.zeros((), device=device) if norm is None else norm.square()
    dist.all_reduce(squared, group=group)
    return squared.sqrt()
