"""Weights put together from all ranks, frozen ones too, which no export needs."""

from __future__ import annotations

from typing import cast

from dayzero.engine.gathering import whole_weights
from dayzero.engine.megatron_fsdp import has_unequal_shards
from dayzero.engine.parallel_model import ParallelModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict


def all_whole_weights(model: ParallelModel) -> dict[str, Tensor]:
    """Every parameter whole, by the model's own names, on rank 0's CPU; empty on other ranks."""
    if has_unequal_shards(model.module):
        return whole_weights(model)  # none is frozen
    options = StateDictOptions(full_state_dict=True, cpu_offload=model.pipeline is None)
    state = cast(dict[str, Tensor], get_model_state_dict(model.module, options=options))
    if model.pipeline:
        state = model.pipeline.collect(state)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}
