"""GGUF files: what they say about themselves, and their conversion to a HF directory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dayzero.console import console, log
from dayzero.errors import ConfigError, DataError

DEFAULT_DTYPE = "bfloat16"


def read_header(file: Path) -> dict[str, Any]:
    """`architecture` and `licence` of a GGUF file; raises DataError when it is damaged."""
    from gguf import GGUFReader

    try:
        fields = GGUFReader(file).fields
        values = {key: fields[key].contents() for key in ("general.architecture", "general.license") if key in fields}
    except OSError:
        raise
    except Exception as error:  # the reader maps the file blindly: what fails depends on where it ends
        raise DataError(f"{file.name}: not a GGUF file, or cut off ({error}): fetch it again") from error
    return {"architecture": values.get("general.architecture"), "licence": values.get("general.license")}


def convert(file: Path, folder: Path, dtype: str | None) -> None:
    """Dequantise a GGUF file into `folder`: config, safetensors, tokenizer, chat template and generation config.

    Raises ConfigError when transformers does not know its architecture.
    """
    for noisy in ("torchao", "torch.utils._pytree"):  # they tell of GPU kernels that are not built
        logging.getLogger(noisy).setLevel(logging.ERROR)
    import torch
    import transformers

    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    name = dtype or DEFAULT_DTYPE
    log.info("dequantising %s to %s safetensors", file.name, name)
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": file.parent,
        "gguf_file": file.name,
        "local_files_only": True,
        "trust_remote_code": False,  # of files that lie beside it: they are not what was asked for
    }
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **where, dtype=getattr(torch, name), quantization_config=transformers.GgufConfig(dequantize=True)
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        architecture = read_header(file)["architecture"]
        raise ConfigError(
            f"model.source {file.name}: transformers {transformers.__version__} cannot read GGUF weights of the "
            f"architecture {architecture!r} ({' '.join(str(error).split())[:120]}): use the model's safetensors version"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
