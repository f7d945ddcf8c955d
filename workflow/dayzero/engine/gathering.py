"""What is put together from all ranks for an export: whole weights, and logits in float32.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dayzero.engine import distributed
from dayzero.engine.ema import Ema
from dayzero.engine.float8 import frozen_float8, plain_weight
from dayzero.engine.frozen import in_float32
from dayzero.engine.loss import CausalLMWithLoss
from dayzero.engine.megatron_fsdp import has_unequal_shards, whole_parameters
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.parallelize import parallelize
from dayzero.engine.passes import logits_of
from dayzero.engine.sharded import free_gathered, trained_state
from dayzero.engine.structure import find_layers
from dayzero.engine.transformer_engine import is_extra_state


def whole_weights(model: ParallelModel) -> dict[str, Tensor]:
    """Every trained parameter whole, by the model's own names, on rank 0's CPU; empty on other ranks."""
    if has_unequal_shards(model.module):
        # none is frozen
        return {name.removeprefix("model."): whole for name, whole in whole_parameters(model.module).items()}
    state = trained_state(model.module, whole=True, cpu_offload=model.pipeline is None)
    if model.pipeline:
        state = model.pipeline.collect(state)
    return {name.removeprefix("model."): tensor for name, tensor in state.items() if not is_extra_state(name)}


def whole_averages(model: ParallelModel, ema: Ema) -> dict[str, Tensor]:
    """`whole_weights` of the averages, in float32, of a model that is split evenly."""
    own = {name: average for name, average in ema.averages.items() if name not in model.names_of_copies}
    whole = {name: average.full_tensor() if isinstance(average, DTensor) else average for name, average in own.items()}
    if model.pipeline:
        whole = model.pipeline.collect(whole)
    elif distributed.rank() != 0:
        return {}
    return {name.removeprefix("model."): tensor.cpu() for name, tensor in whole.items()}


@torch.no_grad()
def float32_logits(model: ParallelModel, input_ids: Tensor, position_ids: Tensor, ema: Ema | None = None) -> Tensor:
    """[B, T] twice -> [B, T, V] on the CPU, of the same weights on the same mesh as training's logits, or with `ema` of
    their averages, but computed in float32 whatever the precision of training. All ranks call it together.

    What an export must give: bf16 training keeps float32 weights, and only their float32 logits can be compared
    closely.
    """
    train, module = model.train, model.module
    if not (train.fp8 or (train.precision != "fp32" and model.dims.strategy == "fsdp2")):
        with ema.in_place() if ema else nullcontext():
            return logits_of(model, module, "fp32", input_ids, position_ids)
    bare = model.empty_module(plain=True)
    module, _, _ = parallelize(
        bare,
        model.dims,
        model.mesh,
        train.model_copy(update={"precision": "fp32", "activation_checkpointing": "none", "compile": False}),
        load=lambda: _share_weights(model, bare, ema),
        found=model.anatomy,
    )
    with in_float32(bare, [] if model.pipeline else list(find_layers(bare.model))):
        return logits_of(model, module, "fp32", input_ids, position_ids)


def _share_weights(model: ParallelModel, bare: CausalLMWithLoss, ema: Ema | None) -> None:
    """Give the equally sharded, meta-device `bare` the weights of training, or their averages.

    They are not copied, but frozen ones that were quantised are loaded once more.
    """
    owner, quantised = model.module, bool(frozen_float8(model.module))
    free_gathered(owner)
    if quantised:
        model.weights.load(bare, bare.model, model.device, offload=model.train.cpu_offload)
        weights = {n: plain_weight(p.detach()) for n, p in owner.named_parameters() if p.requires_grad}
    else:
        weights = {name: plain_weight(t) for name, t in owner.state_dict().items() if not is_extra_state(name)}
    if ema:
        average = dict(zip(ema.parameters, ema.averages.values(), strict=True))
        weights |= {n: average[p] for n, p in owner.named_parameters(remove_duplicate=False) if p in average}
    unknown = bare.load_state_dict(weights, assign=True, strict=not quantised).unexpected_keys
    assert not unknown, unknown
    for name, buffer in () if quantised else owner.named_buffers():  # also those that are not in a state dict
        parent, _, leaf = name.rpartition(".")
        bare.get_submodule(parent)._buffers[leaf] = buffer
