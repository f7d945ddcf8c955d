"""Expert parallelism: each rank of the ep axis holds some of every layer's experts, and tokens travel to them.

The ranks of an ep group see different rows. In each layer they send every (token, expert) pair to the rank that holds
the expert (an all-to-all), run their own experts on what arrives, and send the results back, where the router's weights
add them up (GShard, Lepikhin et al. 2020, https://arxiv.org/abs/2006.16668). No token is dropped and no capacity set,
so the result is that of one process.

What is an expert is found by structure: a module whose parameters all have the experts as their first dim. Its own
forward call runs on the tokens that arrive, each routed to one expert with weight 1, so activation, gate, bias and
kernel stay the model's.

Shapes: N tokens of this rank, K experts of each, E experts, e = E / ep of this rank, P = N K pairs sent, Q pairs that
arrive, D model width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dayzero.errors import ConfigError


def find_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every group of experts: called with hidden states [N, D], the chosen experts [N, K] and their
    weights [N, K], its own parameters [E, ...] with at least one matrix for each expert."""
    return {name: module for name, module in model.named_modules() if _is_experts(module)}


def expert_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The parameters [E, ., .] of `module` itself that have a matrix for each of its experts.

    Once experts are shared out `num_experts` counts those of this rank, while a DTensor's shape is that of all.
    """
    experts = getattr(module, "num_experts", None)
    if not isinstance(experts, int):
        return []
    return [p for p in module.parameters(recurse=False) if p.ndim == 3 and p.shape[0] % experts == 0]


def check_expert_parallel(model: nn.Module, ep: int) -> dict[str, nn.Module]:
    """The experts that `ep` ranks share out. Raises `ConfigError` where there are none, or they cannot be shared."""
    found = find_experts(model)
    if not found:
        raise ConfigError(
            f"parallelism.ep {ep}: {type(model).__name__} has no grouped experts (one tensor for all experts of a "
            "layer): set ep 1; dp_shard shards every model"
        )
    for name, module in found.items():
        if (experts := _num_experts(module)) % ep:
            raise ConfigError(
                f"parallelism.ep {ep}: {name} has experts {experts} / {ep} = {experts / ep:.4g}: use a divisor of "
                f"{experts}"
            )
    return found


def apply_expert_parallel(model: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Share out the experts of the meta-device `model` over the one-dimensional `mesh`; returns their modules.

    Parameters become DTensors split over their first dim, which FSDP2 then shards further.
    """
    found = list(check_expert_parallel(model, mesh.size()).values())
    for module in found:
        for name, parameter in list(module.named_parameters(recurse=False)):
            split = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
            setattr(module, name, nn.Parameter(split, requires_grad=parameter.requires_grad))
        module.num_experts = _num_experts(module) // mesh.size()  # type: ignore[assignment]
        adapters = [m for m in model.modules() if isinstance(m, ParamWrapper) and m.get_base_layer() is module]
        for adapter in adapters:
            adapter.forward = adapter.base_layer.__call__  # type: ignore[method-assign]  # its update is added where the weights are local
        module.forward = _Dispatch(module, module.forward, adapters, mesh.get_group())
    return found


def shard_experts(experts: Sequence[nn.Module], mesh: DeviceMesh, policy: MixedPrecisionPolicy, **options: Any) -> None:
    """Shard what `apply_expert_parallel` left on each ep rank with FSDP2 over the data axes `mesh`.

    `options` are `fully_shard`'s.
    """
    # hidden states are cast by the layer around; the router's weights stay in float32, as they do without ep
    policy = replace(policy, cast_forward_inputs=False)
    for module in experts:
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=expert_placement(mesh.shape[-1]), **options)


def expert_placement(size: int) -> Callable[[nn.Parameter], Shard]:
    """Which dim of an expert parameter FSDP2 shards over `size` ranks: the experts, where they divide evenly.

    With fewer experts than ranks it is the first of the other dims that divides: else some ranks would hold nothing
    (FSDP2 has no uneven shards of a dim that ep has split, nor of any dim but the first).
    """

    def placement(parameter: nn.Parameter) -> Shard:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        for dim, length in enumerate(local.shape):
            if length % size == 0:
                return Shard(dim)
        raise ConfigError(
            f"parallelism.ep: no dim of an expert weight {tuple(local.shape)} divides by dp_shard x cp / ep = {size}: "
            "use another dp_shard or ep"
        )

    return placement


def layer_placement(size: int) -> Callable[[nn.Parameter], Shard | None]:
    """Which dim of a layer's parameters FSDP2 shards over `size` ranks: the first (None, FSDP2's own choice).

    Experts fewer than the ranks are sharded along another dim instead, where one divides: along the first some ranks
    would hold whole experts and the others nothing.
    """

    def placement(parameter: nn.Parameter) -> Shard | None:
        if parameter.ndim < 3 or parameter.shape[0] >= size:
            return None
        return next((Shard(dim) for dim, length in enumerate(parameter.shape) if length % size == 0), None)

    return placement


@torch.no_grad()
def average_expert_gradients(parameters: Iterable[nn.Parameter], ep: int) -> None:
    """Divide the experts' gradients by `ep`, in place; call once after the last backward pass of a step.

    FSDP2 sums gradients over its mesh and divides by the number of its ranks. An expert's gradient is summed over as
    many rows as any other's (its ep group's in the all-to-all, the other groups' by FSDP2), but divided only by the
    ranks of its own, `ep` times smaller mesh.
    """
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor) and "ep" in (grad.device_mesh.mesh_dim_names or ()):
            grad.div_(ep)


class _Dispatch:
    """Takes the place of an experts module's forward call."""

    def __init__(
        self,
        module: nn.Module,
        experts: Callable[..., Tensor],
        adapters: list[ParamWrapper],
        group: dist.ProcessGroup,
    ) -> None:
        self.module, self.experts, self.adapters, self.group = module, experts, adapters, group

    @torch.compiler.disable
    def __call__(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden [N, D], chosen [N, K] of all E experts, weights [N, K] -> [N, D]."""
        ep, local = dist.get_world_size(self.group), _num_experts(self.module)
        experts = chosen.flatten()  # [P]
        order = experts.argsort(stable=True)  # by expert and so by the rank that holds it
        counts = torch.zeros(ep * local, dtype=torch.int64, device=hidden.device)
        sent = counts.scatter_add_(0, experts, torch.ones_like(experts)).view(ep, local)
        arriving = torch.empty_like(sent)
        dist.all_to_all_single(arriving, sent, group=self.group)
        send, take = torch.stack([sent.sum(dim=1), arriving.sum(dim=1)]).tolist()  # the one wait for the device
        tokens = all_to_all_single_autograd(hidden[order // chosen.shape[1]], take, send, self.group)  # [Q, D]
        # they arrive ordered by the rank they come from, then by expert
        which = torch.arange(local, device=hidden.device).repeat(ep)
        which = which.repeat_interleave(arriving.flatten(), output_size=sum(take))  # unsaid, it would be waited for
        done = all_to_all_single_autograd(self._run(tokens, which), send, take, self.group)  # [P, D], in `order`
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        pairs = done[back].view(*chosen.shape, -1)  # [N, K, D]
        return (pairs * weights.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)

    def _run(self, tokens: Tensor, which: Tensor) -> Tensor:
        """tokens [Q, D] through this rank's experts `which` [Q]."""
        arrived = tokens.shape[0]
        if not arrived:
            # one token of zeros whose result is dropped: weights and all-to-all stay in the graph, since the other
            # ranks wait for this one in the backward pass
            tokens, which = F.pad(tokens, (0, 0, 0, 1)), which.new_zeros(1)
        with self._local_parameters():
            output = self.experts(tokens, which.unsqueeze(1), tokens.new_ones(len(tokens), 1))
        return output[:arrived]

    @contextmanager
    def _local_parameters(self) -> Iterator[None]:
        """While active, the module's parameters are this rank's plain tensors, adapted; gradients flow through."""
        parameters: dict[str, Any] = self.module._parameters
        held = dict(parameters)
        local = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in held.items()}
        for adapter in self.adapters:
            local[adapter.parameter_name] = self._adapted(local[adapter.parameter_name], adapter)
        parameters.update(local)
        try:
            yield
        finally:
            parameters.update(held)

    def _adapted(self, weight: Tensor, adapter: ParamWrapper) -> Tensor:
        """weight [e, ...] plus the LoRA update of this rank's experts.

        Adapters are small: every rank holds those of all experts, sharded like any other weight. Each rank's gradient
        is that of its own experts and zero elsewhere, so that the sum over the ranks is the whole.
        """
        first = dist.get_rank(self.group) * len(weight)
        for name in adapter.active_adapters:
            left, right, scaling = adapter.get_delta_factors(name)  # [E, ., r], [E, r, .]
            left, right = (x[first : first + len(weight)] for x in (left, right))
            weight = torch.baddbmm(weight, left, right, alpha=scaling)
        return weight


def _num_experts(module: nn.Module) -> int:
    experts = module.num_experts
    assert isinstance(experts, int)
    return experts


def _is_experts(module: nn.Module) -> bool:
    return (
        bool(expert_matrices(module))
        and all(p.ndim > 1 and p.shape[0] == module.num_experts for p in module.parameters(recurse=False))
        and len(inspect.signature(module.forward).parameters) >= 3
    )
