"""Through the stages on a GPU: what was trained there is exported on the CPU, and vLLM agrees with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dayzero.config import Serving
from dayzero.files import read_json
from dayzero.serving.parity import compare

from tests.exported import tiny_export
from tests.token_store import write_token_store
from tests.train_and_export import train_and_export

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize(
    "method",
    [{"name": "full"}, {"name": "lora", "lora": {"rank": 4}}, {"name": "qlora", "lora": {"rank": 4}}],
    ids=lambda method: method["name"],
)
def test_what_a_gpu_trained_is_exported(method: dict[str, Any], tmp_path: Path) -> None:
    if method["name"] == "qlora":
        pytest.importorskip("bitsandbytes")
    train_and_export(tmp_path, "llama", torch.float32, {"precision": "bf16"}, method=method)
    training = read_json(tmp_path / "model/manifest.json")["reload"]["training"]
    assert training["difference"] <= training["tolerance"]


def test_vllm_agrees_in_float32(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    model, rows = tiny_export(tmp_path / "model"), tmp_path / "tokens/train"
    documents = [(list(range(3, 60)), [token >= 30 for token in range(57)])] * 2
    write_token_store(rows, documents, [[0], [1]])
    assert compare(Serving(num_prompts=2), model, rows.parent, trust_remote_code=False)["verdict"] == "pass"
