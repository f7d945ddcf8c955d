"""Every optimizer over sharded weights against its reference implementation over whole ones, on the same gradients.

Gradients are given, not computed, so that what is compared is the optimizer alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from dayzero.config import Optimizer
from dayzero.engine import distributed
from dayzero.engine.adamw8bit import block_size
from dayzero.engine.optimizer import build_optimizer, set_lr
from dayzero.engine.sharded import local
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

STEPS = 20
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "fused": {"implementation": "fused"},
    "foreach": {"implementation": "foreach"},
    "for-loop": {"implementation": "for-loop"},
    "auto": {},
    "muon": {"name": "muon"},
    "muon-original": {"name": "muon", "muon": {"adjust_lr": "original", "nesterov": False, "lr": 2e-2}},
    "adafactor": {"name": "adafactor", "lr": 1e-2},
    **({"adamw8bit": {"name": "adamw8bit"}} if HAS_TORCHAO else {}),
}


class Experts(nn.Module):
    """A stack of matrices, as mixtures of experts have."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = 4, False
        self.gate_up_proj = nn.Parameter(torch.empty(4, 12, 10))


class Weights(nn.Module):
    """Every kind of parameter: rows that two and four ranks share unevenly, and fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 8)
        self.up = nn.Linear(8, 28)
        self.down = nn.Linear(28, 8, bias=False)
        self.large = nn.Linear(256, 21, bias=False)
        self.odd = nn.Linear(7, 13)
        self.low = nn.Linear(9, 1)
        self.norm = nn.LayerNorm(5)
        self.mixture = nn.ModuleDict({"experts": Experts()})  # apart from `low`, which would be taken for its router
        self.load_state_dict(tensors(self, 0))


def tensors(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Values for each parameter, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=generator) for name, p in module.named_parameters()}


def reference_optimizers(model: Weights, config: Optimizer) -> list[torch.optim.Optimizer]:
    """The same by the libraries' own optimizers."""
    parameters = dict(model.named_parameters())
    plain = [p for n, p in parameters.items() if p.ndim < 2 or n == "embed.weight"]
    decayed = [p for p in parameters.values() if all(p is not other for other in plain)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adam: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw":
        return [torch.optim.AdamW(groups, **adam, foreach=False)]
    if config.name == "adafactor":
        # of float32 weights: for bfloat16 ones torch's floor of squared gradients is that dtype's, ours stays float32's
        return [torch.optim.Adafactor(groups, lr=config.lr, foreach=False)]
    if config.name == "adamw8bit":
        from torchao.optim import AdamW8bit

        return [AdamW8bit(groups, **adam)]
    muon = torch.optim.Muon(
        [p for p in decayed if p.ndim == 2] + [expert for p in decayed if p.ndim == 3 for expert in expert_leaves(p)],
        lr=config.muon.lr or config.lr,
        weight_decay=config.weight_decay,
        momentum=config.muon.momentum,
        nesterov=config.muon.nesterov,
        ns_steps=config.muon.num_iterations,
        adjust_lr_fn=config.muon.adjust_lr,
    )
    return [muon, torch.optim.AdamW(plain, **adam, weight_decay=0.0, foreach=False)]


def expert_leaves(stack: Tensor) -> list[nn.Parameter]:
    """Each expert as a parameter of its own that shares the stack's memory."""
    return [nn.Parameter(matrix) for matrix in stack.detach()]


def run_steps(
    model: Weights, optimizers: list[torch.optim.Optimizer], place: Callable[[Tensor, Tensor], Tensor]
) -> None:
    for step in range(STEPS):
        given = tensors(model, 100 + step)
        for name, parameter in model.named_parameters():
            parameter.grad = place(given[name], parameter)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is None:  # an expert's part of its stack
                        stack, index = next(
                            (s, i)
                            for s in model.mixture.parameters()
                            for i, m in enumerate(s)
                            if m.data_ptr() == p.data_ptr()
                        )
                        p.grad = stack.grad[index].clone()
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return value.clone()
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def sharded_model(tp: int) -> Weights:
    """Over all ranks by FSDP2, with `tp` 2 the two linear layers split by outputs and inputs as well."""
    model = Weights()
    size = distributed.world_size()
    if tp > 1:
        mesh = init_device_mesh("cpu", (size // tp, tp), mesh_dim_names=("dp_shard", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return fully_shard(model, mesh=mesh["dp_shard"])
    return fully_shard(model, mesh=init_device_mesh("cpu", (size,)))


def optimizers(job: dict[str, Any]) -> dict[str, Any]:
    """Largest difference from the reference after `STEPS` steps, and dtypes of the state, of every optimizer."""
    found: dict[str, Any] = {}
    for name, options in OPTIMIZERS.items():
        config = Optimizer(**{"lr": 3e-3, "weight_decay": 0.1, **options})
        if config.name == "adamw8bit" and job["tp"] > 1:
            continue  # rows split by columns have blocks of their own
        whole = Weights()
        expected = reference_optimizers(whole, config)
        with torch.compiler.set_stance("force_eager"):
            run_steps(whole, expected, lambda g, _: g.clone())
        model = sharded_model(job["tp"])
        optimizer = build_optimizer(model, config)
        set_lr(optimizer, config.lr)
        run_steps(model, [optimizer], sharded_like)
        off = {
            n: (p.full_tensor() - w).abs().max().item()
            for (n, p), w in zip(model.named_parameters(), whole.parameters(), strict=True)
        }
        state = optimizer.state
        dtypes = {str(local(v).dtype) for s in state.values() for k, v in s.items() if k != "step"}
        eight = sorted(
            n for n, p in model.named_parameters() if any(hasattr(local(v), "codes") for v in state[p].values())
        )
        blocks = {n: block_size(p) for n, p in model.named_parameters()}
        found[name] = {"off": off, "dtypes": sorted(dtypes), "eight_bits": eight, "blocks": blocks}
    return found
