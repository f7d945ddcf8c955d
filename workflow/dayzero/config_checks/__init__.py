"""Combinations of values that cannot work, and settings that a run would ignore: found before any job runs.

A file for each part of the config. Every check yields pairs of a dotted key and what is wrong there.
"""

from __future__ import annotations

from dayzero.config import RunConfig
from dayzero.config_checks import after_training, data, method, parallelism, sources, training
from dayzero.config_checks.finding import Finding
from dayzero.config_checks.unused import LOSS_KEYS, without_effect

__all__ = ["LOSS_KEYS", "Finding", "impossible", "without_effect"]

OF_TRAINING = (
    training.check_steps_and_optimizer,
    parallelism.check_sizes,
    parallelism.check_nodes,
    training.check_loss,
    method.check_freeze,
    training.check_memory_and_kernels,
    parallelism.check_megatron_fsdp,
    training.check_fp8,
)


def impossible(run: RunConfig) -> list[Finding]:
    """Every impossible combination of a run's values."""
    checks = (
        sources.check_model,
        sources.check_sources,
        data.check_data,
        method.check_lora,
        method.check_kd,
        after_training.check_averages,
        *(OF_TRAINING if run.method.name != "none" else ()),
        after_training.check_export_and_tasks,
    )
    return [Finding(*found) for check in checks for found in check(run)]
