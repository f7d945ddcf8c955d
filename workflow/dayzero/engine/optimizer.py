"""The optimizer, its parameter groups, and the gradient norm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dayzero.config import Optimizer as OptimizerConfig
from dayzero.engine.adafactor import Adafactor
from dayzero.engine.adamw import AdamWInFloat32
from dayzero.engine.adamw8bit import build_adamw8bit
from dayzero.engine.expert_parallel import expert_matrices
from dayzero.engine.muon import Muon
from dayzero.engine.requirements import require_package
from dayzero.engine.sharded import local
from dayzero.errors import ConfigError


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, *, copies: Set[int] = frozenset()
) -> torch.optim.Optimizer:
    """The optimizer that `config` names over the trainable parameters, matrices decayed and the rest not.

    `copies`: ids of parameters that are copies of an embedding on another rank, and treated like it. Raises
    `ConfigError` where the machine lacks what the optimizer needs.
    """
    decay, no_decay = decay_groups(model, copies)
    if config.name == "muon":
        hidden = hidden_matrices(model)
        matrices = [p for p in decay if id(p) in hidden]
        rest = _groups([p for p in decay if id(p) not in hidden], no_decay, config)
        parts = [_muon(matrices, hidden, config)] if matrices else []
        return Together([*parts, *([_adamw(rest, config)] if rest else [])])
    groups = _groups(decay, no_decay, config)
    if config.name == "adafactor":
        return Adafactor(
            groups,
            lr=config.lr,
            beta2_decay=config.adafactor.beta2_decay,
            clip_threshold=config.adafactor.clip_threshold,
            state_dtype=getattr(torch, config.state_dtype),
        )
    if config.name == "adamw8bit":
        return build_adamw8bit(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return _adamw(groups, config)


def require_optimizer(config: OptimizerConfig) -> None:
    """Raise `ConfigError` where the package that the optimizer needs is not installed; starts nothing."""
    if config.name == "adamw8bit":
        require_package("train.optimizer.name adamw8bit", "torchao", "choose adamw")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Take the next step with the learning rate `lr`, times a group's own `lr_factor`."""
    for group in optimizer.param_groups:
        rate = lr * group.get("lr_factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class Together(torch.optim.Optimizer):
    """Optimizers of different parameters as one: their groups and states are its own."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.state = defaultdict(dict)
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Every part's step."""
        assert closure is None
        for part in self.parts:
            part.step()


def hidden_matrices(model: nn.Module) -> dict[int, bool | None]:
    """Id of each weight of linear layers and of experts -> whether it is stored [inputs, outputs]; None where its
    module does not say. Those of embeddings, the LM head and routers are not among them."""
    outer: set[int] = set()
    found: dict[int, bool | None] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            outer |= {id(p) for p in module.parameters(recurse=False)}
        elif _is_linear(module):
            found[id(module.weight)] = isinstance(module, Conv1D)
        if isinstance(module, PreTrainedModel) and (head := module.get_output_embeddings()) is not None:
            outer |= {id(p) for p in head.parameters()}
        outer |= {id(linear.weight) for linear in _routers(module)}
        found |= {id(p): getattr(module, "is_transposed", None) for p in expert_matrices(module)}
    return {key: transposed for key, transposed in found.items() if key not in outer}


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer: one of torch's or GPT-2's, or made like torch's, as transformer-engine's are."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    weight = getattr(module, "weight", None)
    return hasattr(module, "in_features") and isinstance(weight, nn.Parameter) and weight.ndim == 2


def _routers(block: nn.Module) -> Iterator[nn.Module]:
    """The linear layers beside experts in `block` that score each, or gate what all tokens share."""
    counts = {count for child in block.children() if (count := _count_experts(child))}
    for child in block.children() if counts else ():
        linears = [m for m in (child, *child.children()) if _is_linear(m)]
        # a shared expert has several, one of which may happen to have as many outputs
        if len(linears) == 1 and _outputs(linears[0]) in {1, *counts}:
            yield linears[0]


def _outputs(linear: nn.Module) -> int:
    assert isinstance(linear.weight, Tensor)
    return linear.weight.shape[1 if isinstance(linear, Conv1D) else 0]


def _count_experts(module: nn.Module) -> int:
    if isinstance(module, nn.ModuleList):
        return len(module) if len({type(child) for child in module}) == 1 else 0
    # of a DTensor the shape is that of all ranks' experts
    return next((p.shape[0] for p in expert_matrices(module)), 0)


def _groups(decay: list[nn.Parameter], no_decay: list[nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    groups = [
        {"params": decay, "weight_decay": config.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _muon(matrices: list[nn.Parameter], hidden: dict[int, bool | None], config: OptimizerConfig) -> Muon:
    muon = config.muon
    if muon.adjust_lr == "original" and any(hidden[id(p)] is None for p in matrices):
        raise ConfigError(
            "train.optimizer.muon.adjust_lr original: steps depend on inputs and outputs, and this model's experts do "
            "not say which of their dims is which: use match_rms_adamw"
        )
    factor = 1.0 if muon.lr is None else muon.lr / config.lr
    kinds = {way: [p for p in matrices if bool(hidden[id(p)]) == way] for way in (False, True)}
    settings = {"weight_decay": config.weight_decay, "lr_factor": factor}
    return Muon(
        [{"params": kind, "transposed": way, **settings} for way, kind in kinds.items() if kind],
        lr=config.lr * factor,
        momentum=muon.momentum,
        nesterov=muon.nesterov,
        num_iterations=muon.num_iterations,
        adjust_lr=muon.adjust_lr,
        state_dtype=getattr(torch, config.state_dtype),
    )


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's AdamW where moments have the weights' dtype, in the implementation asked for.

    auto is the fused kernel, the fastest and leanest of the three over DTensors (docs/methods.md), and the plain loop
    on a device that has none. All three are deterministic.
    """
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    dtype = getattr(torch, config.state_dtype)
    if any(p.dtype != dtype for group in groups for p in group["params"]):
        return AdamWInFloat32(groups, **options, state_dtype=dtype)
    choice: dict[str, Any] = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}
    if config.implementation != "auto":
        return torch.optim.AdamW(groups, **options, **choice[config.implementation])
    try:
        return torch.optim.AdamW(groups, **options, fused=True)
    except RuntimeError:  # torch says so when the device has no fused kernel
        return torch.optim.AdamW(groups, **options, foreach=False)


def decay_groups(model: nn.Module, copies: Set[int] = frozenset()) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters to decay (matrices) and not to (biases, norms, embeddings), in module order."""
    kept = copies | {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.Embedding) or _is_vector(module, name, parameter)
    }
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (no_decay if id(parameter) in kept else decay).append(parameter)
    return decay, no_decay


def _is_vector(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether `parameter` is a bias or a norm's weight: stacked for experts or heads they have two dims too."""
    if name == "weight" and _is_linear(module):
        return False
    return (
        sum(size > 1 for size in parameter.shape) < 2
        or name.endswith("bias")
        or "norm" in type(module).__name__.lower()
    )


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
        # at once and on shares: the host takes longer over hundreds of small DTensors than the device
        torch._foreach_mul_([local(grad) for _, grad in owned], scale)
    return total.item()


def _root_of_sum_of_squares(norm: Tensor | None, group: dist.ProcessGroup) -> Tensor:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    norm = torch.zeros((), device=device) if norm is None else norm
    squared = norm.square().to(device)  # with gradients on the CPU too: another rank may have none
    dist.all_reduce(squared, group=group)
    return squared.sqrt().to(norm.device)
