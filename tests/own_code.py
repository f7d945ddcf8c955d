"""A tiny exported model whose classes are Python code of its own, as many models have on the day they come out."""

from __future__ import annotations

import json
from pathlib import Path

from tests.exported import tiny_export

CODE = """
import os
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

Path(os.environ["OWN_CODE_RAN"]).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_model"


class OwnDecoder(LlamaModel):  # what vLLM's transformers backend asks for
    config_class = OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def own_code_model(path: Path) -> Path:
    """Save it to `path`. When its code runs, the file that the environment names in OWN_CODE_RAN comes to be."""
    tiny_export(path)
    file = path / "config.json"
    config = json.loads(file.read_text())
    config |= {"model_type": "own_model", "architectures": ["OwnForCausalLM"]}
    classes = {"AutoConfig": "OwnConfig", "AutoModel": "OwnDecoder", "AutoModelForCausalLM": "OwnForCausalLM"}
    config["auto_map"] = {auto: f"own_model.{own}" for auto, own in classes.items()}
    file.write_text(json.dumps(config))
    (path / "own_model.py").write_text(CODE)
    return path
