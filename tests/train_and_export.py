"""Through the train and the export stage with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from dayzero.files import write_json
from dayzero.stages import export, train
from transformers import AutoConfig, AutoModelForCausalLM

from tests.tiny import ARCHITECTURES, write_rows
from tests.tiny_tokenizer import tiny_tokenizer


def train_and_export(folder: Path, name: str, dtype: torch.dtype, trained: dict[str, Any], **sections: Any) -> Path:
    """Run both stages on a model of the architecture `name`, stored in `dtype`; returns `folder`/train.

    The export stands in `folder`/model, the base model in base. `trained`: settings of training.
    """
    base, tokens, out = folder / "base", folder / "tokens", folder / "train"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURES[name])).to(dtype).save_pretrained(base)
    tiny_tokenizer(base)
    write_json(base / "manifest.json", {"dtype": "float32", "files": {}})
    write_rows(tokens / "train", packed=True)
    write_json(tokens / "manifest.json", {"max_token_id": 127, "files": {}})
    settings = {"max_steps": 3, "global_batch_size": 4, "optimizer": {"lr": 1e-2}, **trained}
    config = json.dumps({"experiment": "tiny", "run": "one", "train": settings, **sections})
    given = ["--config", config, "--model", str(base)]
    assert train.main([*given, "--tokens", str(tokens), "--output", str(out)]) == 0
    assert export.main([*given, "--train", str(out), "--output", str(folder / "model")]) == 0
    return out
