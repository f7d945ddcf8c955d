"""`export`, `evaluate`, `serving`: what becomes of the trained weights."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from dayzero.config.section import Section


class Export(Section):
    """The plain Hugging Face directory made of the trained weights."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype of the exported weights. null: that of the stored base model (float32 for pretrain)."""
    weights: Literal["last", "ema"] = "last"
    """The trained weights as they were at the end, or their average (`train.ema`)."""
    max_shard_size: str = "5GB"
    """Largest size of one safetensors file."""


class Evaluate(Section):
    """Scores by lm-eval."""

    tasks: list[str] = []
    """Tasks of config/tasks or built into lm-eval. Empty: no evaluation."""
    extra_tasks: list[str] = []
    """Tasks of this run beside the experiment's."""
    limit: PositiveInt | None = None
    """Items of each task. null: all."""
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Prompts in a batch. auto: what memory allows."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Compute dtype. auto: as exported."""
    seed: NonNegativeInt = 1234
    """Seed of few-shot sampling."""


class Serving(Section):
    """The comparison of vLLM with transformers on the exported directory."""

    num_prompts: PositiveInt = 4
    """Prompts taken from the validation rows."""
    max_new_tokens: PositiveInt = 16
    """Greedy tokens compared for each prompt."""
    max_prompt_tokens: PositiveInt = 256
    """Longer prompts are cut to their last tokens."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Compute dtype of both sides; only float32 can be expected to agree token by token."""
    tolerance: PositiveFloat = 1e-3
    """Largest allowed difference of a prompt token's log probability."""
