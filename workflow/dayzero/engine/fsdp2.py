"""FSDP2 (torch's `fully_shard`): which modules are gathered together, over which ranks, and what each of them keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from dayzero.config import Train
from dayzero.engine.expert_parallel import layer_placement, shard_experts
from dayzero.engine.frozen import frozen_in_bf16
from dayzero.engine.loss import CausalLMWithLoss
from dayzero.engine.precision import mixed_precision_policy


def apply_fsdp2(
    module: CausalLMWithLoss,
    roots: Sequence[nn.Module],
    layers: Sequence[nn.Module],
    mesh: DeviceMesh,
    train: Train,
    *,
    experts: Sequence[nn.Module] = (),
    expert_mesh: DeviceMesh | None = None,
    unsharded: bool = False,
    keep_gathered: bool = False,
) -> None:
    """Shard the meta-device `module` over the data axes `mesh`, in place: each layer apart, the rest with its root.

    `roots` are the module or the stages of a pipeline, `experts` those that expert parallelism has split, sharded over
    the data axes `expert_mesh`. `unsharded`: each rank holds everything; `keep_gathered`: nothing is freed after a
    forward pass.
    """
    policy = mixed_precision_policy(train.precision, module)
    placement = layer_placement(mesh.shape[-1])
    kept: dict[str, Any] = {"reshard_after_forward": False} if keep_gathered else {}
    offload: dict[str, Any] = {}
    if train.cpu_offload:
        offload["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    elif unsharded:
        # FSDP2 would copy them in every forward and backward pass
        kept["ignored_params"] = frozen_in_bf16(module)
    kept |= offload
    if experts:
        assert expert_mesh is not None
        shard_experts(experts, expert_mesh, policy, **offload)
    for layer in layers:
        if not _shares_parameters(layer, module):
            fully_shard(layer, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, **kept)
    for root in roots:
        fully_shard(root, mesh=mesh, mp_policy=policy, **kept)


def _shares_parameters(layer: nn.Module, root: nn.Module) -> bool:
    """Whether a parameter of `layer` is also used outside it: such a layer is sharded together with the root."""
    own = {id(p) for p in layer.parameters()}
    inside = {id(m) for m in layer.modules()}
    return any(id(p) in own for m in root.modules() if id(m) not in inside for p in m.parameters(recurse=False))
