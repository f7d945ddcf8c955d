"""torch.compile of each layer by itself: one graph is compiled and serves all layers alike."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from dayzero.console import log
from dayzero.user_cache import user_cache

CACHE = "TORCHINDUCTOR_CACHE_DIR"

GRAPHS = 64
"""Graphs that torch may make of one piece of code. Layers of several kinds, with and without gradients, in training and
in validation, with lengths that differ, need more than its own 8, past which it refuses."""


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each layer into one graph, or where it cannot be one, into several.

    What was compiled is kept on the disk and found again by later processes: see `keep_compiled`.
    """
    keep_compiled()
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(GRAPHS, settings.recompile_limit)
    # what modules note for one another in the forward pass (see `SharedInput`) is not noted again when activation
    # checkpointing computes it again, nor needed; without this torch compiles no such layer at all
    settings.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for layer in layers:
        layer.compile(fullgraph=True)
        layer._compiled_call_impl = _Compiled(layer)


class _Compiled:
    """Calls a layer's one graph; from the first call on that torch refuses, its several."""

    told = False

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.call: Any = layer._compiled_call_impl
        self.whole = True

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not self.whole:
            return self.call(*args, **options)
        try:
            return self.call(*args, **options)
        except (RuntimeError, FailOnRecompileLimitHit) as refused:
            if not isinstance(refused, Unsupported | FailOnRecompileLimitHit) and "fullgraph=True" not in str(refused):
                raise
            first, _Compiled.told = not _Compiled.told, True
            if first:
                reason = str(refused).strip().splitlines()[0]
                log.info("train.compile: layers are compiled in several graphs, not one: %s", reason)
            self.layer.compile()
            self.call, self.whole = self.layer._compiled_call_impl, False
            self.layer._compiled_call_impl = self
            before = graphs_compiled()
            output = self.call(*args, **options)
            if first and graphs_compiled() == before:
                log.warning("train.compile: torch compiles nothing of these layers: they run as without it")
            return output


def graphs_compiled() -> int:
    """How many graphs torch has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def keep_compiled() -> Path:
    """Have torch keep what it compiles in the user's cache, unless TORCHINDUCTOR_CACHE_DIR names a folder.

    torch's own default is in the machine's temporary folder, which a restart on another node does not find. Importing
    torch's compiler puts that default into the variable, here or in the process that started this one (whose temporary
    folder may be another): a folder of that name is no choice of the user's.
    """
    named = os.environ.get(CACHE)
    if named and Path(named).name != Path(default_cache_dir()).name:
        return Path(named)
    kept = user_cache() / "compiled"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=kept).close()
    except OSError as error:
        kept = Path(default_cache_dir())
        remedy = f"set XDG_CACHE_HOME or {CACHE} to a folder that can be written"
        log.warning("train.compile: a restart will not find what is compiled: %s: %s", error, remedy)
    os.environ[CACHE] = str(kept)
    return kept
