"""Writing a model as a plain Hugging Face directory without ever having it in memory: a tensor or two at a time.

Names and layout are those of `save_pretrained`, whose own conversion back to the hub's naming runs on each small group
of tensors that it needs together (one fused parameter gives many experts). The groups are found on the meta device: a
group is right when what it is converted to is part of what the whole model is converted to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dayzero.console import track
from dayzero.safetensors_file import INDEX, NewFile


def write_model(
    directory: Path,
    model: PreTrainedModel,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    max_shard_size: str,
    tied: Mapping[str, str],
) -> None:
    """Write the meta-device `model` with the values that `read` gives by name; parameters are cast to `dtype`.

    Config and generation settings are those of `model`. `tied` are the names that are left out.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(directory, state_dict={})  # config, generation settings and code of its own
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied and _saved(model, name)}
    whole = _like(revert_weight_conversion(model, dict(state)))
    split = split_torch_state_dict_into_shards(
        whole, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    files = {
        file: NewFile(directory / file, {name: whole[name] for name in names})
        for file, names in split.filename_to_tensors.items()
    }
    for group in track(_groups(model, state, whole), "writing weights"):
        values = {name: read(name).to(dtype) if name in parameters else read(name) for name in group}
        made = revert_weight_conversion(model, values)
        for name, tensor in made.items():
            files[split.tensor_to_filename[name]].write(name, tensor)
        del values, made
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _saved(model: PreTrainedModel, name: str) -> bool:
    return name not in (getattr(model, "_keys_to_ignore_on_save", None) or ())


def _like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of these shapes that share nothing: views would count with the whole storage that they are of."""
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}


def _groups(model: PreTrainedModel, state: dict[str, Tensor], whole: dict[str, Tensor]) -> list[list[str]]:
    """Names that are converted together: as few as give what the whole gives, at worst all of them."""
    groups: list[list[str]] = []
    waiting, made = list(state), set[str]()
    for level in range(1 + max(name.count(".") for name in state)):
        together: dict[str, list[str]] = {}
        for name in waiting:
            together.setdefault(".".join(name.split(".")[:-level]) if level else name, []).append(name)
        waiting = []
        for names in together.values():
            given = _converted(model, {name: state[name] for name in names})
            if given and not made & set(given) and all(n in whole and whole[n].shape == s for n, s in given.items()):
                groups.append(names)
                made |= set(given)
            else:
                waiting += names
    if waiting:  # no part of the model will do
        return [list(state)]
    assert made == set(whole), sorted(set(whole) - made)[:3]
    return groups


def _converted(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    try:
        return {name: tensor.shape for name, tensor in revert_weight_conversion(model, tensors).items()}
    except Exception:  # each conversion has its own way to say that something is missing
        return {}
