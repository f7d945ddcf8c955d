"""Weight files: which ones a model directory offers, their dtypes, and conversion to safetensors."""

from __future__ import annotations

import json
import math
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dayzero.console import ProgressBar, log, track
from dayzero.errors import ConfigError, DataError
from dayzero.files import read_json, write_json
from dayzero.safetensors_file import INDEX, read_header

PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE = re.compile(r".*\.(bin|pt|pth|pkl|ckpt)$")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COPY_BLOCK = 1 << 24


def choose_weights(names: Iterable[str], allow_pickle: bool, source: str) -> list[str]:
    """The weight files to take, of all names in a model's top folder: safetensors, else (if allowed) pickles.

    Raises ConfigError when there are none, or only pickles and `allow_pickle` is off.
    """
    names = sorted(names)
    safe = [n for n in names if n.endswith(".safetensors") and not n.startswith(("consolidated", "adapter_"))]
    if "model.safetensors" in safe and INDEX not in names:
        return ["model.safetensors"]
    if INDEX in names and safe:
        return [INDEX, *safe]
    if safe:
        raise ConfigError(f"model.source {source}: {', '.join(safe)} without {INDEX}: the directory is incomplete")
    pickles = [n for n in names if PICKLE.match(n) and "training_args" not in n]
    if not pickles:
        raise ConfigError(f"model.source {source}: no weights: expected model.safetensors (or {INDEX} and its files)")
    if not allow_pickle:
        raise ConfigError(
            f"model.source {source}: only pickled weights ({pickles[0]}), which can run code when read: use a "
            "safetensors version, or set model.allow_pickle: true"
        )
    pickles = [n for n in pickles if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", n)]
    if not pickles:
        raise ConfigError(f"model.source {source}: no pytorch_model.bin among its pickles: save it as a HF directory")
    return [*pickles, *([PICKLE_INDEX] if PICKLE_INDEX in names else [])]


def indexed_files(folder: Path, names: list[str]) -> list[str]:
    """Only the files that the index names, where there is one; raises DataError when one of them is missing."""
    index = next((n for n in names if n in (INDEX, PICKLE_INDEX)), None)
    if index is None:
        return names
    try:
        wanted = sorted(set(read_json(folder / index)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{folder / index}: not a weight index ({error}): fetch the model again") from error
    if missing := [n for n in wanted if n not in names]:
        raise DataError(f"{folder}: {index} names {missing[0]}, which is missing: fetch the model again")
    return [index, *wanted]


def store_weights(source: Path, names: list[str], target: Path, dtype: str | None, link: bool) -> None:
    """Bring the weight files to `target` as safetensors, converting what is pickled or of another floating dtype.

    `link` makes hard links where nothing changes (for files of ours that no one else writes to). Raises DataError for
    a damaged file and ConfigError for a pickle with more than tensors in it.
    """
    wanted = getattr(torch, dtype) if dtype else None
    weight_map: dict[str, str] = {}
    total_size = 0
    changed = False
    files = [n for n in names if n not in (INDEX, PICKLE_INDEX)]
    for name in track(files, "storing weight files") if len(files) > 1 else files:
        if name.endswith(".safetensors"):
            if wanted is None or set(tensor_dtypes(source / name)) & set(_FLOATS) <= {wanted}:
                copy_file(source / name, target / name, link)
                continue
            tensors = _read_safetensors(source / name)
            new_name = name
        else:
            tensors = _read_pickle(source / name)
            new_name = re.sub(r"^pytorch_model(.*)\.bin$", r"model\1.safetensors", name)
        changed = True
        tensors = _own_storage(tensors, wanted)
        save_file(tensors, target / new_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, new_name)
        total_size += sum(t.nbytes for t in tensors.values())
    if INDEX in names and not changed:
        copy_file(source / INDEX, target / INDEX, link)
    elif changed and len(files) > 1:
        for name in files:
            if name.endswith(".safetensors") and name not in weight_map.values():
                weight_map |= {tensor.name: name for tensor in read_header(target / name)}
                total_size += (target / name).stat().st_size
        write_json(target / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def tensor_dtypes(file: Path) -> Counter[torch.dtype]:
    """Number of elements by dtype in a safetensors file, from its header; raises DataError when it is damaged."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in read_header(file):
        counts[tensor.dtype] += math.prod(tensor.shape)
    return counts


def copy_file(source: Path, target: Path, link: bool) -> None:
    """Copy (or hard-link, where `link` allows and the disk can) one file, behind a progress bar when it is big."""
    source = source.resolve()  # the hub's cache holds links
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            target.hardlink_to(source)
            return
        except OSError:
            pass  # another disk
    size = source.stat().st_size
    bar = ProgressBar(f"copying {source.name}, MB", size // 2**20, enabled=size > 200 * 2**20)
    with bar, open(source, "rb") as f, open(target, "wb") as out:
        while block := f.read(COPY_BLOCK):
            out.write(block)
            bar.advance(len(block) // 2**20)
    shutil.copystat(source, target)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise DataError(f"{file}: damaged or cut-off weights ({error}): fetch the model again") from error


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    with _open(file) as f:
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    log.info("reading the pickled weights of %s (tensors only)", file.name)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except OSError:
        raise
    except Exception as error:  # pickle, zip and torch errors of many kinds
        raise ConfigError(
            f"{file}: not a pickle of tensors only, or damaged ({' '.join(str(error).split())[:120]}): use safetensors"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ConfigError(f"{file}: not a plain dictionary of tensors: save it with save_pretrained")
    return tensors


def _own_storage(tensors: dict[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Contiguous tensors that share no memory (safetensors refuses that), floats in `dtype`."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        new = tensor.to(dtype) if dtype is not None and tensor.dtype in _FLOATS else tensor
        new = new.contiguous()
        if new.data_ptr() in seen or new.untyped_storage().nbytes() != new.nbytes:
            new = new.clone()
        seen.add(new.data_ptr())
        result[name] = new
    return result


def set_config_dtype(config_file: Path, dtype: str) -> None:
    """Write the weights' new dtype into config.json (`dtype`, and the older `torch_dtype` where it stands)."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    for part in (config, *(v for v in config.values() if isinstance(v, dict) and "model_type" in v)):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    config.setdefault("torch_dtype" if "torch_dtype" in config else "dtype", dtype)
    write_json(config_file, config)
