"""NF4 base weights under LoRA: the numbers, the module, which modules, and what the export makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dayzero.config import Lora, Method
from dayzero.engine.export import streamed_logits
from dayzero.engine.lora import save_adapter
from dayzero.engine.model import ModelSource, build_model, count_parameters
from dayzero.engine.quantized import NF4, Nf4Linear, dequantize_nf4, quantize_nf4, require_qlora, rounded_nf4
from dayzero.engine.trained_weights import TrainedWeights
from dayzero.errors import ConfigError
from dayzero.files import write_json

from tests.tiny import ARCHITECTURES, VOCAB_SIZE

INPUT = torch.arange(1, 13).unsqueeze(0) % VOCAB_SIZE
QLORA = Method(name="qlora", lora=Lora(rank=4))


@pytest.mark.parametrize("shape", [(32, 64), (48, 40), (7, 9), (1, 1)])
def test_every_number_becomes_the_nearest_of_its_block(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    packed, scales = quantize_nf4(weight)
    assert packed.shape == (-(-weight.numel() // 2), 1)
    flat, found = weight.flatten(), dequantize_nf4(packed, scales, weight.shape, torch.float32).flatten()
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        grid = torch.tensor(NF4) * block.abs().max()
        nearest = (block.unsqueeze(1) - grid).abs().amin(dim=1)
        torch.testing.assert_close((block - found[start : start + 64]).abs(), nearest, rtol=0, atol=1e-6)
    assert torch.equal(rounded_nf4(rounded_nf4(weight)), rounded_nf4(weight))
    assert torch.equal(rounded_nf4(torch.zeros(shape)), torch.zeros(shape))


def test_a_module_computes_with_the_rounded_weight() -> None:
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(24, 16), torch.randn(3, 5, 24, requires_grad=True)
    quantized = Nf4Linear(linear)
    quantized.fill(linear.weight)
    expected = F.linear(x, rounded_nf4(linear.weight), linear.bias)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    found = quantized(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], gradient, rtol=1e-5, atol=1e-5)
    assert list(quantized.state_dict()) == ["bias"]


def test_frozen_matrices_of_the_layers_are_quantised_and_no_others(tmp_path: Path) -> None:
    """And the export is the model that was trained: adapters on rounded weights."""
    source = ModelSource(directory=None, architecture=ARCHITECTURES["qwen3"])
    plain = build_model(source, source.config(), Method(name="full"), seed=0, meta=False)
    plain.save_pretrained(tmp_path / "base")
    source = ModelSource(directory=tmp_path / "base")
    model = build_model(source, source.config(), QLORA, seed=3, meta=False).eval()
    names = {name for name, module in model.named_modules() if isinstance(module, Nf4Linear)}
    assert len(names) == 4 * 7
    assert all(".layers." in name and name.endswith(".base_layer") for name in names)
    assert count_parameters(model)[1] == count_parameters(build_model(source, source.config(), Method(name="lora",
        lora=QLORA.lora), seed=3, meta=True))[1]  # fmt: skip
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 4 * 7 * 2
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.1)
        expected = model(input_ids=INPUT, use_cache=False).logits
    save_adapter(tmp_path / "train/adapter", QLORA.lora, {n: p.detach() for n, p in trained.items()}, "base")
    write_json(tmp_path / "train/summary.json", {})
    for method, equal in ((QLORA, True), (Method(name="lora", lora=QLORA.lora), False)):
        weights = TrainedWeights(source, None, method, 3, tmp_path / "train")
        difference = (streamed_logits(weights.model, weights.read, INPUT) - expected).abs().max()
        assert (difference <= 1e-5) == equal, difference


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_refused_in_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"^method\.name qlora needs an NVIDIA GPU and the package bitsandbytes, but "
    ) as refused:
        require_qlora()
    assert "\n" not in str(refused.value)
