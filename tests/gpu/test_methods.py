"""What needs a GPU among methods and losses: QLoRA's kernel, and the losses without logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dayzero.config import Lora, Method
from dayzero.engine.chunks import IGNORE
from dayzero.engine.loss import CausalLMWithLoss
from dayzero.engine.loss_choice import LOSSES
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.quantized import dequantize_nf4, quantize_nf4

from tests.tiny import ARCHITECTURES, VOCAB_SIZE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_the_kernel_makes_the_same_weights_as_the_cpu() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    weight = torch.randn(256, 192)
    packed, scales = quantize_nf4(weight)
    on_gpu = quantize_nf4(weight.cuda())
    assert torch.equal(on_gpu[0].cpu(), packed)
    assert torch.equal(on_gpu[1].cpu(), scales)
    theirs, state = functional.quantize_4bit(weight.cuda(), blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(theirs, on_gpu[0])
    assert torch.equal(state.absmax, on_gpu[1])
    for dtype in (torch.float32, torch.bfloat16):
        found = dequantize_nf4(*on_gpu, weight.shape, dtype)
        assert torch.equal(found.cpu(), dequantize_nf4(packed, scales, weight.shape, dtype))


def test_qlora_gives_the_logits_of_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    source = ModelSource(directory=None, architecture=ARCHITECTURES["qwen3"], random_weights=True)
    model = build_model(source, source.config(), Method(name="qlora", lora=Lora(rank=4)), seed=0, meta=False).eval()
    tokens = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        on_cpu = model(input_ids=tokens).logits
        on_gpu = model.cuda()(input_ids=tokens.cuda()).logits
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "package", "dtype"),
    [("liger_fused", "liger_kernel", torch.float32), ("cut_cross_entropy", "cut_cross_entropy", torch.bfloat16)],
)
def test_losses_without_logits(loss: str, package: str, dtype: torch.dtype) -> None:
    pytest.importorskip(package)
    torch.manual_seed(0)
    source = ModelSource(directory=None, architecture=ARCHITECTURES["qwen3"], random_weights=True)
    model = build_model(source, source.config(), Method(name="full"), seed=0, meta=False).to("cuda", dtype)
    input_ids = torch.randint(0, VOCAB_SIZE, (3, 33), device="cuda")
    labels = torch.where(torch.rand(3, 33, device="cuda") < 0.4, input_ids, IGNORE)
    positions = torch.arange(33, device="cuda").expand(3, 33)
    found = []
    for name in ("cross_entropy", loss):
        model.zero_grad()
        value = CausalLMWithLoss(model, loss=LOSSES[name])(input_ids, labels, positions)
        (value / 7).backward()
        found.append((value.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2  # of bfloat16 the kernel's own order of summation is seen
    torch.testing.assert_close(found[1][0].float(), found[0][0].float(), rtol=tolerance, atol=0)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(
            found[1][1][name], gradient, rtol=tolerance, atol=tolerance * gradient.abs().max().item()
        )
