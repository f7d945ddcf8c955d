"""Forward and backward passes of a `ParallelModel`: what becomes of a rank's rows on any mesh.

Rows are padded to what the mesh divides, split over the ranks of a context, brought to the device, and computed in the
precision asked for.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from dayzero.config import Fp8
from dayzero.engine.chunks import IGNORE
from dayzero.engine.document_attention import look_for_documents, may_be_packed
from dayzero.engine.expert_parallel import average_expert_gradients
from dayzero.engine.float8 import plain_products
from dayzero.engine.loss import known_positions
from dayzero.engine.megatron_fsdp import has_unequal_shards, require_gradients
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.precision import autocast
from dayzero.engine.sdpa_order import sdpa_order
from dayzero.engine.tensor_parallel import pad_tokens, sum_partial_gradients
from dayzero.engine.transformer_engine import float8_autocast, token_multiple


def backward(model: ParallelModel, micro_batches: list[dict[str, Tensor]], scale: float, router_weight: float) -> float:
    """Gradients of `scale` times the summed loss of all `micro_batches`, complete on every rank.

    Returns the share of the sum seen here. `router_weight`: see `CausalLMWithLoss`.
    """
    if model.pipeline:
        longest = max((batch["position_ids"] for batch in micro_batches), key=lambda positions: positions.shape[1])
        with _kernels(model, longest):
            loss_sum = model.pipeline.train(micro_batches, scale, model.context)
    else:
        # summed on the device: reading every loss would let it idle between micro-batches
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        for index, micro_batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with _gradient_sync(model, last=last), _kernels(model, micro_batch["position_ids"]):
                loss = summed_loss(model, micro_batch, router_weight)
                (loss * scale).backward()
            total += loss.detach()
        if model.distillation:
            model.distillation.teacher.reshard()
        loss_sum = total.item()
    if has_unequal_shards(model.module):
        require_gradients(model.module)
    if model.partial:
        assert model.mesh is not None
        sum_partial_gradients(model.partial, model.mesh.get_group("tp"))
    if model.dims.ep > 1:
        average_expert_gradients(model.module.parameters(), model.dims.ep)
    return loss_sum


def summed_loss(model: ParallelModel, micro_batch: dict[str, Tensor], router_weight: float = 0.0) -> Tensor:
    """This rank's sum of the token losses of its rows."""
    rows = micro_batch["input_ids"], micro_batch["labels"], micro_batch["position_ids"]
    real_tokens = torch.arange(rows[0].shape[1]) < micro_batch["lengths"].unsqueeze(1) if router_weight else None
    fp8 = model.train.fp8
    return _forward(model, model.module, model.train.precision, *rows, real_tokens, router_weight, fp8=fp8)


def training_logits(model: ParallelModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """[B, T] twice -> [B, T, V] on the CPU, float32, as computed in training. All ranks call it together."""
    return logits_of(model, model.module, model.train.precision, input_ids, position_ids, fp8=model.train.fp8)


def probe_logits(model: ParallelModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """`training_logits` with products that are not of 8 bits: one scale for all tokens lets each one's rounding depend
    on the others, as if the model saw them."""
    with plain_products(model.module):
        return logits_of(model, model.module, model.train.precision, input_ids, position_ids)


@torch.no_grad()
def logits_of(
    model: ParallelModel,
    module: nn.Module,
    precision: str,
    input_ids: Tensor,
    position_ids: Tensor,
    *,
    fp8: Fp8 | None = None,
) -> Tensor:
    """`training_logits` of a `module` that lies on the ranks as that of `model` does."""
    module.eval()
    found = _forward(model, module, precision, input_ids, None, position_ids, fp8=fp8)
    module.train()
    return found.float().cpu()


@torch.no_grad()
def teacher_logits(model: ParallelModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """`training_logits` of the model's teacher."""
    assert model.distillation is not None
    teacher = model.distillation.teacher.all_logits
    return _forward(model, teacher, model.train.precision, input_ids, None, position_ids).float().cpu()


def _forward(
    model: ParallelModel,
    module: Callable[..., Tensor],
    precision: str,
    input_ids: Tensor,
    labels: Tensor | None,
    position_ids: Tensor,
    real_tokens: Tensor | None = None,
    router_weight: float = 0.0,
    *,
    fp8: Fp8 | None = None,
) -> Tensor:
    """[B, T] rows, on any device -> this rank's summed loss, or without labels all logits [B, T, V]."""
    multiple, tokens = _token_multiple(model), input_ids.shape[1]
    inputs = [
        pad_tokens(input_ids, multiple, 0),
        None if labels is None else pad_tokens(labels, multiple, IGNORE),
        pad_tokens(position_ids, multiple, None),
        None if real_tokens is None else pad_tokens(real_tokens, multiple, False),
    ]
    documents: AbstractContextManager[None] = nullcontext()
    if model.context:
        model.context.enter(cast(Tensor, inputs[2]).to(model.device))
        inputs = [None if x is None else model.context.split(x) for x in inputs]
    else:
        documents = look_for_documents(cast(Tensor, inputs[2]))
    unknown = inputs[1] is None or inputs[1].is_cuda or model.pipeline
    inputs.append(None if unknown else known_positions(cast(Tensor, inputs[1])))
    if model.device.type == "cuda":  # from other memory a copy waits for what the device is doing
        inputs = [x if x is None or x.is_cuda else x.pin_memory() for x in inputs]
    inputs = [None if x is None else x.to(model.device, non_blocking=True) for x in inputs]
    *inputs, real_tokens, positions = inputs
    more = {} if real_tokens is None else {"real_tokens": real_tokens, "router_weight": router_weight}
    if positions is not None:
        more["positions"] = positions
    with (
        documents,
        _kernels(model, position_ids),
        autocast(precision, "none" if model.mixes_dtypes else model.dims.strategy, model.device),
        float8_autocast(fp8),
    ):
        output = module(*inputs, **more)
    if labels is not None:
        return output
    return (model.context.join(output) if model.context else output)[:, :tokens]


def _token_multiple(model: ParallelModel) -> int:
    """What rows are padded to."""
    return model.dims.token_multiple * token_multiple(model.train.fp8)


def _kernels(model: ParallelModel, position_ids: Tensor) -> AbstractContextManager[None]:
    """SDPA's order of kernels for rows [B, T] as they come from the loader."""
    tokens = (position_ids.shape[1] + -position_ids.shape[1] % _token_multiple(model)) // model.dims.cp
    attentions = {model.attention} | ({model.distillation.teacher.attention} if model.distillation else set())
    by_documents = bool(attentions & {"documents", "varlen"}) and may_be_packed(position_ids)
    return sdpa_order(model.device, tokens, by_documents=by_documents)


def _gradient_sync(model: ParallelModel, *, last: bool) -> AbstractContextManager[Any]:
    """Reduce gradients over ranks in the last micro-batch only.

    Under FSDP2 that keeps the whole gradient on every rank meanwhile, which is small for adapters; of other weights
    each micro-batch's is reduced to its shard at once.
    """
    if model.dims.strategy == "ddp" and not last:
        return cast(DistributedDataParallel, model.module).no_sync()
    if model.dims.strategy == "fsdp2" and model.method.adapters:
        for part in model.sharded_adapters:
            part.set_requires_gradient_sync(last, recurse=False)
        if model.keeps_gathered:
            cast(FSDPModule, model.module).set_reshard_after_backward(last)
    return nullcontext()
