"""Pipeline parallelism: each rank holds some of the layers and passes hidden states on to the next.

    pp 2, 1f1b               pp 2, interleaved (two stages a rank)      pp 2, zero_bubble (in a V)
    rank 0: embed, 0 1 2     rank 0: embed, 0 1 | 4 5                   rank 0: embed, 0 1 | 6 7, norm, head
    rank 1: 3 4 5, norm,     rank 1: 2 3 | 6 7, norm, head              rank 1: 2 3 | 4 5
            head

Where the model is cut says `pipeline_cut.py`, how a stage runs `pipeline_stage.py`. Here are the schedules, those of
torch.distributed.pipelining, and what the stages have in common: losses, tied parameters, whole weights.

Shapes: B rows of a micro-batch, T tokens (after cp has split them), D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble
from torch.distributed.tensor import DTensor

from dayzero.engine.chunks import IGNORE
from dayzero.engine.context_parallel import ContextParallel
from dayzero.engine.deferred_gradients import DeferredGradients
from dayzero.engine.loss import CausalLMWithLoss
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.pipeline_cut import Anatomy, cut_layers
from dayzero.engine.pipeline_stage import Stage
from dayzero.engine.precision import computes_in_bf16
from dayzero.engine.tensor_parallel import pad_tokens

Batch = dict[str, Tensor]
"""`input_ids`, `labels`, `position_ids`, each [B, T]."""


class Pipeline:
    """This rank's stages of `whole`, which is cut in place: from then on calling it runs the whole pipeline."""

    def __init__(
        self,
        whole: CausalLMWithLoss,
        found: Anatomy,
        dims: ParallelDims,
        group: dist.ProcessGroup,
        device: torch.device,
        precision: str,
    ) -> None:
        dims.check_layers(found.num_layers)
        cuts = cut_layers(whole.model, found, dims.num_stages)
        self.dims, self.group, self.device = dims, group, device
        self.rank = dist.get_rank(group)
        self.hidden_size, self.vocab_size = found.hidden_size, found.vocab_size
        self.dtype = torch.bfloat16 if computes_in_bf16(precision) else torch.float32
        """What is sent between stages."""
        self.copies = _untie(whole.model, found)
        self.stages = [Stage(whole, found, s, dims.num_stages, cuts[s], self.dtype) for s in dims.stages_of(self.rank)]
        self.stages[0].install()  # between calls the model has the modules of all stages
        for stage in self.stages:
            stage.install_own()
        whole.forward = self.evaluate  # type: ignore[method-assign, assignment]
        self._whole = whole
        # of the layers: losses may ask for the head's gradients while they compute
        self._deferred = [DeferredGradients(s.layers) for s in self.stages] if dims.pp_schedule == "zero_bubble" else []
        self._shape: tuple[int, ...] = ()
        self._schedule: Any = None
        self._scale = 1.0
        self._losses: list[Tensor] = []

    def train(self, micro_batches: list[Batch], scale: float, context: ContextParallel | None = None) -> float:
        """Forward and backward passes of all `micro_batches`; their gradients are those of `scale` times the loss.
        With `context` their rows are split over its ranks.

        Returns the summed loss on the ranks with the last stage, 0 on the others.
        """
        longest = max(batch["input_ids"].shape[1] for batch in micro_batches)
        tokens = -(-longest // self.dims.token_multiple) * self.dims.token_multiple
        fills = {"input_ids": 0, "labels": IGNORE, "position_ids": None}
        rows = {
            name: torch.cat([pad_tokens(batch[name], tokens, fill) for batch in micro_batches]).to(self.device)
            for name, fill in fills.items()
        }
        if context:
            whole = rows["position_ids"]
            rows = {name: context.split(x) for name, x in rows.items()} | {"row_positions": whole}
            tokens = rows["input_ids"].shape[1]
            for stage in self.stages:
                stage.context = context
        shape = len(micro_batches), len(micro_batches[0]["input_ids"]), tokens
        if shape != self._shape:  # the buffers have one shape, so for another one all is made anew
            self._schedule, self._shape = self._build_schedule(*shape), shape
        self._scale, self._losses = scale, []
        has_loss = any(stage.is_last for stage in self.stages)
        self._schedule.step(target=rows["labels"] if has_loss else None, return_outputs=False, **rows)
        self._sum_gradients_of_copies()
        return float(sum(loss.item() for loss in self._losses))

    def evaluate(self, input_ids: Tensor, labels: Tensor | None, position_ids: Tensor) -> Tensor:
        """[B, T] three times -> the summed loss, on ranks without the last stage 0; without labels logits [B, T, V]
        on all ranks. No gradient."""
        rows = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        output: Tensor = torch.zeros((), device=self.device)
        owner = self.dims.stage_owner
        with torch.no_grad():
            for index in range(self.dims.num_stages):
                if owner(index) != self.rank:
                    continue
                stage = self.stages[self.dims.stages_of(self.rank).index(index)]
                received = []
                if index and owner(index - 1) == self.rank:
                    received = [output]
                elif index:
                    received = [torch.empty(*input_ids.shape, self.hidden_size, dtype=self.dtype, device=self.device)]
                    dist.recv(received[0], group=self.group, group_src=owner(index - 1))
                output = stage(*received, **rows)
                stage.reshard()
                if not stage.is_last and owner(index + 1) != self.rank:
                    dist.send(output, group=self.group, group_dst=owner(index + 1))
        last = owner(self.dims.num_stages - 1)
        if labels is not None:
            return output if last == self.rank else torch.zeros((), device=self.device)
        shape = *input_ids.shape, self.vocab_size
        logits = output.float().contiguous() if last == self.rank else torch.empty(shape, device=self.device)
        dist.broadcast(logits, group=self.group, group_src=last)
        return logits

    def copies_here(self) -> frozenset[int]:
        """Ids of the parameters here that the first stage holds too; it accounts for them."""
        parameters = dict(self._whole.named_parameters())
        return frozenset(id(parameters[other]) for _, other in self.copies if other in parameters)

    def collect(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """All stages' whole tensors on rank 0's CPU; nothing on other ranks."""
        main = dist.get_rank() == 0
        mine = {name: tensor.cpu() for name, tensor in state.items()}
        parts: list[Any] | None = [None] * self.dims.pp if self.rank == 0 else None
        dist.gather_object(mine, parts, group=self.group, group_dst=0)
        return {name: tensor for part in parts or () for name, tensor in part.items()} if main else {}

    def _build_schedule(self, num_micro_batches: int, rows: int, tokens: int) -> Any:
        # the shapes are known, so nothing has to be tried or sent to find them out
        hidden = torch.empty(rows, tokens, self.hidden_size, dtype=self.dtype, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        stages = [
            PipelineStage(
                stage,
                index,
                self.dims.num_stages,
                self.device,
                input_args=() if stage.is_first else hidden,
                output_args=loss if stage.is_last else hidden,
                group=self.group,
                dw_builder=self._deferred[number].take if self._deferred else None,
            )
            for number, (stage, index) in enumerate(zip(self.stages, self.dims.stages_of(self.rank), strict=True))
        ]
        options: dict[str, Any] = {"loss_fn": self._scaled_loss, "scale_grads": False}
        if self.dims.pp_schedule == "1f1b":
            return Schedule1F1B(stages[0], num_micro_batches, **options)
        schedule = {"interleaved": ScheduleInterleaved1F1B, "zero_bubble": ScheduleZBVZeroBubble}
        return schedule[self.dims.pp_schedule](cast(Any, stages), num_micro_batches, **options)

    def _scaled_loss(self, loss: Tensor, _: Tensor) -> Tensor:
        self._losses.append(loss.detach())
        return loss * self._scale

    @torch.no_grad()
    def _sum_gradients_of_copies(self) -> None:
        """Give both holders of a tied parameter the sum of their gradients: the same to the bit, as a + b is b + a."""
        parameters = dict(self._whole.named_parameters())
        ends = self.dims.stage_owner(0), self.dims.stage_owner(self.dims.num_stages - 1)
        for names in self.copies:
            here = [parameters[name] for name in names if name in parameters]
            grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in here if p.grad is not None]
            assert len(grads) in (0, len(here)), names
            if len(grads) == 2:
                total = grads[0] + grads[1]
                for grad in grads:
                    grad.copy_(total)
            elif grads:
                other = ends[1] if self.rank == ends[0] else ends[0]
                grads[0].add_(_exchange(grads[0], other, self.group))


def _exchange(tensor: Tensor, other: int, group: dist.ProcessGroup) -> Tensor:
    """Send `tensor` to rank `other` of `group`; what that rank sends here."""
    received = torch.empty_like(tensor)
    transfers = [
        dist.P2POp(dist.isend, tensor.contiguous(), group=group, group_peer=other),
        dist.P2POp(dist.irecv, received, group=group, group_peer=other),
    ]
    for transfer in dist.batch_isend_irecv(transfers):
        transfer.wait()
    return received


def _untie(model: nn.Module, found: Anatomy) -> list[tuple[str, str]]:
    """Give the last modules' tied parameters a place of their own; the pairs' names in the module around `model`."""
    for one, other in found.tied:
        parent, _, leaf = other.rpartition(".")
        shared = model.get_parameter(one)
        setattr(model.get_submodule(parent), leaf, nn.Parameter(torch.empty_like(shared), shared.requires_grad))
    return [(f"model.{one}", f"model.{other}") for one, other in found.tied]
