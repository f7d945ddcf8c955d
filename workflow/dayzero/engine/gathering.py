"""What is put together from all ranks for an export: whole weights, and logits in float32.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from dayzero.engine.float8 import frozen_float8, plain_weight
from dayzero.engine.frozen import in_float32
from dayzero.engine.loss import CausalLMWithLoss
from dayzero.engine.megatron_fsdp import has_unequal_shards, whole_parameters
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.parallelize import parallelize
from dayzero.engine.passes import logits_of
from dayzero.engine.sharded import local
from dayzero.engine.structure import find_layers


def whole_weights(model: ParallelModel, *, frozen: bool = False) -> dict[str, Tensor]:
    """Every trained parameter whole, by the model's own names, on rank 0's CPU; empty on other ranks.

    `frozen`: those that are not trained too.
    """
    if has_unequal_shards(model.module):
        # none is frozen
        return {name.removeprefix("model."): whole for name, whole in whole_parameters(model.module).items()}
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=model.pipeline is None, ignore_frozen_params=not frozen
    )
    state = cast(dict[str, Tensor], get_model_state_dict(model.module, options=options))
    if model.pipeline:
        state = model.pipeline.collect(state)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


@torch.no_grad()
def float32_logits(model: ParallelModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """[B, T] twice -> [B, T, V] on the CPU, of the same weights on the same mesh as training's logits, but computed in
    float32 whatever the precision of training. All ranks call it together.

    What an export must give: bf16 training keeps float32 weights, and only their float32 logits can be compared
    closely.
    """
    train, module = model.train, model.module
    if not (train.fp8 or (train.precision != "fp32" and model.dims.strategy == "fsdp2")):
        return logits_of(model, module, "fp32", input_ids, position_ids)
    bare = model.empty_module(plain=True)
    module, _, _ = parallelize(
        bare,
        model.dims,
        model.mesh,
        train.model_copy(update={"precision": "fp32", "activation_checkpointing": "none", "compile": False}),
        load=lambda: _share_weights(model, bare),
        found=model.anatomy,
    )
    with in_float32(bare, [] if model.pipeline else list(find_layers(bare.model))):
        return logits_of(model, module, "fp32", input_ids, position_ids)


def _share_weights(model: ParallelModel, bare: CausalLMWithLoss) -> None:
    """Give the equally sharded, meta-device `bare` the weights of training.

    They are not copied, but where frozen ones were quantised: those are loaded once more, and the trained ones copied.
    """
    owner = model.module
    if frozen_float8(owner):
        model.weights.load(bare, bare.model, model.device, offload=model.train.cpu_offload)
        for name, parameter in owner.named_parameters():
            if parameter.requires_grad:
                local(bare.get_parameter(name)).copy_(local(parameter))
        return
    bare.load_state_dict({n: plain_weight(tensor) for n, tensor in owner.state_dict().items()}, assign=True)
    for name, buffer in owner.named_buffers():  # also those that are not in a state dict
        parent, _, leaf = name.rpartition(".")
        bare.get_submodule(parent)._buffers[leaf] = buffer
