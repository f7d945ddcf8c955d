"""The weights of a Hugging Face directory, given to a model's shards straight from the files.

transformers knows under which names and in which layout each architecture is stored (its WeightRenaming and
WeightConverter: experts one by one become one fused parameter, prefixes come and go). Its rules are applied here to one
parameter at a time; what they come to is first found out with the headers alone, on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from dayzero.console import ProgressBar, log
from dayzero.engine.distributed import rank
from dayzero.engine.share import Share
from dayzero.pretrained import load_causal_lm
from dayzero.safetensors_file import StoredTensor, stored_tensors


@dataclass
class Conversion:
    """Stored tensors that together become one or more of the model's."""

    first_target: str
    converter: WeightConverter | None
    """None: one stored tensor is the model's, under another name perhaps."""
    sources: list[tuple[str, StoredTensor]] = field(default_factory=list)
    """(the converter's pattern that the name matched, tensor)."""
    targets: dict[str, Tensor] = field(default_factory=dict)
    """The model's tensors, on the meta device."""

    def convert(self, model: PreTrainedModel, read: list[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The model's tensors from (pattern, stored tensor) pairs."""
        assert self.converter is not None
        converter = deepcopy(self.converter)
        for pattern, tensor in read:
            converter.add_tensor(self.first_target, pattern, pattern, tensor)  # type: ignore[arg-type]
        made = converter.convert(self.first_target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    @property
    def expert_by_expert(self) -> bool:
        """Whether every source is one row of dim 0 of the only target, which can then be made row by row."""
        if self.converter is None or len(self.targets) != 1:
            return False
        first, *rest = self.converter.operations
        if not isinstance(first, MergeModulelist) or first.dim != 0:
            return False
        # positive dims only: the others' meaning would depend on the tensor
        return all(
            isinstance(op, Concatenate | Chunk | Transpose)
            and all(getattr(op, name) > 0 for name in ("dim", "dim0", "dim1") if hasattr(op, name))
            for op in rest
        )


class StoredWeights:
    """The tensors that a directory holds for a model, by the model's names."""

    def __init__(self, directory: Path, model_class: type[PreTrainedModel], config: PretrainedConfig) -> None:
        """Read the headers. Raises `DataError` where they lack some of the model's weights or have other shapes."""
        stored = stored_tensors(directory)
        with _no_progress_bar():
            self.model = load_causal_lm(
                directory,
                model_class=model_class,
                config=config,
                state_dict={name: tensor.meta() for name, tensor in stored.items()},
                dtype=torch.float32,
                device_map="meta",
            )
        """The model as transformers loads it, without memory."""
        state = self.model.state_dict()
        self.conversions = _conversions(self.model, stored, state)
        self.by_target = {name: conversion for conversion in self.conversions for name in conversion.targets}
        self.names = set(self.by_target)
        """All tensors that are here; a tied one may be here under one of its names only."""
        self.stored = stored
        used = {stored.name for conversion in self.conversions for _, stored in conversion.sources}
        self.unused = sorted(set(stored) - used)
        """Stored names for which the model has no place."""
        self.tied: dict[str, str] = dict(self.model.all_tied_weights_keys)
        """Name of a tied tensor -> the name of the tensor that it is."""
        for name, source in list(self.tied.items()):
            if name in self.names and source in self.names and self._differ(name, source):
                log.warning(
                    "WARNING: %s: the config ties %s to %s, but both are stored and differ: they stay two",
                    directory, name, source,
                )  # fmt: skip
                del self.tied[name]

    def fill(self, tensors: Mapping[str, Tensor]) -> set[str]:
        """Give `tensors`, DTensors or plain ones by the model's names, their values; returns the names that are here.

        One tensor is read at a time, and of it only the rows that a rank holds; experts stored one by one are fused one
        by one. Any other conversion holds its whole tensors, before and after, for a moment.
        """
        wanted = list({id(c): c for c in (self.by_target[n] for n in tensors if n in self.names)}.values())
        bar = ProgressBar("loading weights", len(wanted), enabled=rank() == 0 and len(wanted) > 1)
        with bar:
            for conversion in wanted:
                self._fill(conversion, tensors)
                bar.advance()
        return self.names & set(tensors)

    def _fill(self, conversion: Conversion, tensors: Mapping[str, Tensor]) -> None:
        shares = {name: Share(tensors[name]) for name in conversion.targets if name in tensors}
        if all(share.empty for share in shares.values()):
            return
        if conversion.converter is None:
            ((_, stored),) = conversion.sources
            for share in shares.values():
                _fill_rows(share, stored)
        elif conversion.expert_by_expert:
            ((name, target),) = conversion.targets.items()
            self._fill_experts(shares[name], conversion, target.dtype)
        else:
            dtypes = {target.dtype for target in conversion.targets.values()}
            dtype = dtypes.pop() if len(dtypes) == 1 else None
            made = conversion.convert(self.model, [(p, s.read().to(dtype)) for p, s in conversion.sources])
            for name, share in shares.items():
                share.fill(made[name])

    def _fill_experts(self, share: Share, conversion: Conversion, dtype: torch.dtype) -> None:
        stacks: dict[str, list[StoredTensor]] = {}
        for pattern, stored in conversion.sources:
            stacks.setdefault(pattern, []).append(stored)
        here = 0
        (rows,) = {len(stack) for stack in stacks.values()}
        for start, stop in share.rows(rows):
            for row in range(start, stop):
                read = [(pattern, stack[row].read().to(dtype)) for pattern, stack in stacks.items()]
                (made,) = conversion.convert(self.model, read).values()
                share.local[here : here + 1].copy_(share.cut(made, first_dim=1))
                here += 1

    def _differ(self, name: str, other: str) -> bool:
        by_name = {c.first_target: c.sources[0][1] for c in self.conversions if c.converter is None}
        a, b = by_name.get(name), by_name.get(other)
        if a is None or b is None or a.shape != b.shape:
            return True
        rows = a.shape[0] if a.shape else 1
        return any(not torch.equal(x, b.read(at, at + len(x)).to(x.dtype)) for at, x in a.blocks(0, rows))


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()


def _conversions(model: PreTrainedModel, stored: dict[str, StoredTensor], state: dict[str, Tensor]) -> list[Conversion]:
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    found: dict[str, Conversion] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:  # renamed for nothing: it has the model's name but for the prefix
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target in state:  # the others were said to have no place
            converter = by_pattern[pattern] if pattern is not None else None
            conversion = found.setdefault(target, Conversion(target, converter))
            conversion.sources.append((pattern or name, stored[name]))
    for conversion in found.values():
        if conversion.converter is None:
            conversion.sources = conversion.sources[-1:]
            conversion.targets = {conversion.first_target: state[conversion.first_target]}
        else:
            made = conversion.convert(model, [(pattern, source.meta()) for pattern, source in conversion.sources])
            conversion.targets = {name: state[name] for name in made if name in state}
            wrong = {name: value.shape for name, value in made.items() if value.shape != state[name].shape}
            assert not wrong, f"{conversion.first_target}: {wrong}"
    return list(found.values())


def _fill_rows(share: Share, stored: StoredTensor) -> None:
    if not stored.shape:
        share.fill(stored.read())
        return
    here = 0
    with torch.no_grad():
        for start, stop in share.rows(stored.shape[0]):
            for _, rows in stored.blocks(start, stop):
                share.local[here : here + len(rows)].copy_(share.cut(rows, first_dim=1))
                here += len(rows)
