"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from dayzero.config import LrScheduler


def lr_factor(step: int, max_steps: int, config: LrScheduler) -> float:
    """The share of the peak learning rate at `step` (counted from 1 to `max_steps`).

    Linear warm-up reaches 1 at step `warmup_steps`; the curve begins at 1 in the step after it and would reach
    `min_lr_ratio` in the step after the last, so that every step trains: transformers' and torchtitan's are the same.
    wsd stays at 1 until the last `decay_steps` (Hu et al. 2024, https://arxiv.org/abs/2404.06395).
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    floor = config.min_lr_ratio
    if config.name == "constant":
        return 1.0
    if config.name == "wsd":
        decay = config.decay_steps if config.decay_steps is not None else max(1, max_steps // 10)
        decay = min(decay, max_steps - config.warmup_steps)
        left = max_steps + 1 - step
        return 1.0 if left >= decay else floor + (1 - floor) * left / decay
    progress = (step - 1 - config.warmup_steps) / (max_steps - config.warmup_steps)
    if config.name == "linear":
        return floor + (1 - floor) * (1 - progress)
    assert config.name == "cosine", config.name
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
