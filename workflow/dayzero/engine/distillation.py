"""Knowledge distillation: a student learns the labels and what a teacher makes of every token before them.

The loss is cross-entropy + weight * T^2 * KL(teacher || student), both distributions at temperature T, over the label
tokens (forward KL, Hinton et al. 2015, https://arxiv.org/abs/1503.02531; T^2 keeps the gradients' size). The teacher
runs without gradients, in evaluation mode, split and sharded as the student is. Logits of neither model ever exist
whole: hidden states of the label positions pass both heads a chunk at a time.

Shapes: B rows, T tokens, D model width (each model's own), V vocabulary, N label tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from dayzero.config import Kd, Method, Train
from dayzero.engine.chunks import IGNORE, sum_of_chunks
from dayzero.engine.document_attention import forget_documents
from dayzero.engine.kernels import use_attention
from dayzero.engine.loss import CausalLMWithLoss, Head, LossOptions, at_labels, chunked, loss_of_logits
from dayzero.engine.model import ModelSource
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallelize import parallelize
from dayzero.engine.precision import computes_in_bf16
from dayzero.engine.sharded import free_gathered
from dayzero.engine.token_split import require_context_parallel
from dayzero.engine.weights import Weights
from dayzero.errors import ConfigError


class Teacher(CausalLMWithLoss):
    """A frozen model, called once for its hidden states and then for their logits: the root that FSDP2 shards.

    `attention`: which one it has, see `kernels.use_attention`.
    """

    def __init__(self, model: PreTrainedModel, attention: str = "sdpa") -> None:
        super().__init__(model.requires_grad_(False))
        self.head = Head(model)
        self.attention = attention

    @torch.no_grad()
    def forward(self, first: Tensor, position_ids: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Token ids and position ids [B, T] -> hidden states [B, T, D]; hidden states [N, D] alone -> logits [N, V]."""
        if position_ids is None:
            return self.head.logits(first)
        forget_documents()
        hidden = self.head.hidden(first, position_ids)
        forget_documents()  # the student says its own
        return hidden

    def all_logits(self, input_ids: Tensor, _: None, position_ids: Tensor) -> Tensor:
        """[B, T] twice -> [B, T, V], called as a model with its loss is."""
        hidden = self(input_ids, position_ids)
        return self(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    def reshard(self) -> None:
        """Free what FSDP2 keeps gathered from one chunk to the next."""
        free_gathered(self)


def teacher_weights(source: ModelSource) -> Weights:
    """The weights of the model at `source`, of which only the headers are read."""
    return Weights(source, source.config(), Method(name="none"), 0)


def build_teacher(
    weights: Weights, train: Train, dims: ParallelDims, mesh: DeviceMesh | None, device: torch.device
) -> Teacher:
    """The teacher with its weights on the student's mesh; under ddp whole on each rank.

    Where FSDP2 computes in bfloat16 its weights are kept so: they are never trained, and half the size. It attends as
    `train.attention: auto` would have it. Raises `ConfigError` where its tokens cannot be split over cp.
    """
    model = weights.empty_model()
    if dims.cp > 1:
        require_context_parallel(weights.template, dims.cp, dims.cp_method)
    attention = use_attention(model, train.model_copy(update={"attention": "auto"}), dims)
    teacher = Teacher(model, attention)
    load = partial(weights.load, teacher, model, device)
    if dims.strategy == "fsdp2":
        if computes_in_bf16(train.precision):
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        settings = train.model_copy(update={"activation_checkpointing": "none"})
        parallelize(teacher, replace(dims, ep=1), mesh, settings, load)
    else:
        load()
    return teacher.eval()


class Distillation:
    """The loss of a student with `teacher`; it also keeps count of the KL part."""

    def __init__(self, teacher: Teacher, config: Kd) -> None:
        self.teacher, self.config = teacher, config
        self._sum: float | Tensor = 0.0

    def loss(
        self, model: PreTrainedModel, input_ids: Tensor, labels: Tensor, position_ids: Tensor, options: LossOptions
    ) -> Tensor:
        """One of loss.py's losses; outside training that of the labels alone."""
        if not model.training:
            return chunked(model, input_ids, labels, position_ids, options)
        head = Head(model)
        taught = self.teacher(input_ids, position_ids)
        # [N], [N, D of the teacher], [N, D]
        labels, taught, hidden = at_labels(labels, options, taught, head.hidden(input_ids, position_ids))

        def chunk_loss(hidden: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
            logits = head.logits(hidden).float()
            kl = kl_divergence(logits, self.teacher(taught).float(), self.config.temperature, labels)
            self._sum = self._sum + kl.detach()
            return loss_of_logits(logits, labels, options.z_loss) + self.config.weight * kl

        return sum_of_chunks(chunk_loss, hidden, labels, options.chunk_size, taught)

    def take_sum(self) -> float:
        """The summed KL of the losses since the last time this was asked, T^2 included, the weight not."""
        taken, self._sum = float(self._sum), 0.0
        return taken


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float, labels: Tensor) -> Tensor:
    """Logits [N, V] twice, labels [N] -> T^2 * KL(teacher || student) at temperature T, summed over label tokens."""
    divergence = F.kl_div(
        (student / temperature).log_softmax(dim=-1),
        (teacher / temperature).log_softmax(dim=-1),
        reduction="none",
        log_target=True,
    ).sum(dim=-1)
    return temperature**2 * (divergence * (labels != IGNORE)).sum()


def check_vocabularies(student: PreTrainedModel, teacher: PreTrainedModel, name: str) -> None:
    """Raise `ConfigError` where the two models' logits are not over the same tokens."""
    sizes = [cast(nn.Embedding, m.get_input_embeddings()).num_embeddings for m in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"method.kd.teacher {name}: its vocabulary has {sizes[1]} entries, the model's {sizes[0]}: use a teacher "
            "with the same tokenizer and vocabulary"
        )
