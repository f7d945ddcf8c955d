"""`method`: how the model is trained."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from dayzero.config.section import Section


class Lora(Section):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685)."""

    rank: PositiveInt = 16
    """Rank of the update."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input. 0: off."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead, so that higher ranks learn as fast (rsLoRA,
    https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Train the length of each weight row apart from its direction (DoRA, https://arxiv.org/abs/2402.09353). Not with
    tp > 1 nor on fused experts."""
    modules_to_save: list[str] = []
    """Modules trained whole beside the adapters, by the end of their names, e.g. [embed_tokens, lm_head]; they are
    kept in the adapter's files, as PEFT's modules_to_save."""
    targets: str | list[str] = "all-linear"
    """Module name suffixes, one regular expression over full names, or `all-linear`: every linear module that an
    adapter can serve but the LM head, and fused experts (which stay frozen with dropout or DoRA; the log says so)."""


class Kd(Section):
    """Knowledge distillation (https://arxiv.org/abs/1503.02531): the loss is cross-entropy + `weight` * KL(teacher ||
    model) over the label tokens."""

    teacher: str | None = None
    """A run of this experiment (its exported model), or a model as in `model.source`; with the same tokenizer."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits; the KL is multiplied by its square, so that gradients keep their size."""
    weight: PositiveFloat = 1.0
    """Weight of the KL."""


class Method(Section):
    """How the model is trained."""

    name: Literal["none", "full", "lora", "qlora", "kd", "pretrain"] = "lora"
    """none: the untouched model; full: all weights; lora: adapters; qlora: adapters over a base in 4 bits (GPU); kd:
    all weights, with a teacher beside the labels; pretrain: all weights from random ones."""
    lora: Lora = Lora()
    kd: Kd = Kd()
    freeze: list[str] = []
    """Parameters that are not trained, by patterns (with * ? [ ]) of their whole names, e.g. "*.layers.0.*". Not with
    adapters, which leave all else frozen."""

    @property
    def adapters(self) -> Lora | None:
        """What adapters are trained; None where none are."""
        return self.lora if self.name in ("lora", "qlora") else None

    def used(self) -> dict[str, Any]:
        """The keys that decide what this method does."""
        kept = {"name"} | ({"lora"} if self.adapters else set()) | ({"freeze"} if self.freeze else set())
        kept |= {"kd"} if self.name == "kd" else set()
        return self.model_dump(mode="json", include=kept)
