"""What only an NVIDIA GPU runs: kernels for packed rows, Liger, 8-bit products, CPU offload, fused optimizers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from dayzero.config import Fp8, Method, Optimizer, Train
from dayzero.engine.attention_blocks import EfficientOnCUDA, block_attention, difference
from dayzero.engine.document_attention import has_varlen
from dayzero.engine.float8 import CAPABILITY, FrozenFloat8Linear, product, to_float8
from dayzero.engine.kernels import use_attention, use_fused_kernels
from dayzero.engine.loss import CausalLMWithLoss
from dayzero.engine.model import ModelSource
from dayzero.engine.optimizer import build_optimizer
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.passes import backward
from torch import nn

from tests.distributed.cases import job
from tests.distributed.launch import run_ranks
from tests.tiny import ARCHITECTURES, VOCAB_SIZE
from tests.unit.test_document_attention import ONE, model_of, rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
HAS_FLOAT8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= CAPABILITY
LENGTHS = [[30, 90, 8], [128]]


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids, positions = (x.cuda() for x in rows(LENGTHS))
    model.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = CausalLMWithLoss(model)(ids, ids, positions)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(got: tuple[Any, Any], want: tuple[Any, Any]) -> None:
    """Within what bfloat16 rounds."""
    torch.testing.assert_close(got[0], want[0], rtol=1e-2, atol=0)
    off = torch.stack([(got[1][n] - g).norm() for n, g in want[1].items()]).norm()
    assert off <= 5e-2 * torch.stack([g.norm() for g in want[1].values()]).norm()


@pytest.mark.parametrize("attention", ["documents", "flex", "varlen"])
def test_attention_of_packed_rows(attention: Any) -> None:
    if attention == "varlen" and not has_varlen():
        pytest.skip("this torch has no varlen attention")
    model = model_of("llama", hidden_size=128, head_dim=32).cuda()
    want = loss_and_gradients(model)
    assert use_attention(model, Train(max_steps=1, attention=attention), ONE) == attention
    close(loss_and_gradients(model), want)


@pytest.mark.parametrize("width", [64, 128])
def test_blocks_of_ring_attention(width: int) -> None:
    assert difference(EfficientOnCUDA(), "cuda", torch.float32, width) < 1e-2
    assert isinstance(
        block_attention(torch.zeros(1, 1, 1, width, dtype=torch.bfloat16, device="cuda")), EfficientOnCUDA
    )


def test_liger() -> None:
    pytest.importorskip("liger_kernel")
    model = model_of("llama", hidden_size=128, head_dim=32).cuda()
    want = loss_and_gradients(model)
    assert use_fused_kernels(model, Train(max_steps=1, kernels="liger"), ONE)
    close(loss_and_gradients(model), want)


@pytest.mark.skipif(not HAS_FLOAT8, reason="needs a GPU of compute capability 8.9")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_products_of_8_bit_floats_are_what_they_are_emulated_to_be(recipe: Any) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(48, 64, device="cuda").bfloat16(), torch.randn(32, 64, device="cuda")
    by_row = recipe == "rowwise"
    a, a_scale = to_float8(x, torch.float8_e4m3fn, by_row=by_row)
    b, b_scale = to_float8(weight, torch.float8_e4m3fn, by_row=by_row)
    scale = b_scale.t() if by_row else b_scale
    real, emulated = (product(a, a_scale, b.t(), scale, torch.bfloat16, e) for e in (False, True))
    torch.testing.assert_close(real, emulated, rtol=2e-2, atol=2e-2 * emulated.abs().max().item())


@pytest.mark.skipif(not HAS_FLOAT8, reason="needs a GPU of compute capability 8.9")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_frozen_weights_in_8_bits(recipe: Any) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 48, device="cuda")
    found = []
    for emulate in (False, True):
        linear = FrozenFloat8Linear(plain, Fp8(recipe=recipe, emulate=emulate)).cuda()
        linear.quantize(plain.weight)
        x = torch.randn(32, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
        x.requires_grad_()
        out = linear(x)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
        found.append((out.detach(), gradient))
    for real, emulated in zip(*found, strict=True):
        assert (real - emulated).float().norm() <= 2e-2 * emulated.float().norm()


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_the_implementations_of_adamw_agree(implementation: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(32, 16, device="cuda")
    other = copy.deepcopy(model).cpu()
    for module, kind in ((model, implementation), (other, "for-loop")):
        optimizer = build_optimizer(module, Optimizer(lr=1e-2, implementation=kind))
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            for p in module.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(p.device)
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=0, atol=1e-6)


@pytest.mark.distributed
def test_weights_kept_on_the_cpu_give_the_same_curve(tmp_path: Path) -> None:
    jobs = [
        job("train", "llama", "full", "packed", tmp_path, strategy="fsdp2", train={"cpu_offload": on})
        for on in (False, True)
    ]
    results = run_ranks(min(torch.cuda.device_count(), 2), jobs, tmp_path / "ranks")
    off, on = (results[j["name"]]["losses"] for j in jobs)
    torch.testing.assert_close(on, off, rtol=1e-5, atol=0)


@pytest.mark.parametrize("setting", ["full", "selective"])
def test_layers_are_computed_again_by_the_kernel_that_computed_them_first(setting: Any) -> None:
    """Rows of 128 tokens are those that cuDNN attends to."""
    ids = torch.randint(0, VOCAB_SIZE, (2, 128), generator=torch.Generator().manual_seed(0))
    lengths, places = torch.tensor([128, 128]), torch.arange(128).expand(2, -1)
    rows = {"input_ids": ids, "labels": ids, "position_ids": places, "lengths": lengths}
    found = []
    for activation_checkpointing in ("none", setting):
        model = ParallelModel(
            source=ModelSource(directory=None, architecture=ARCHITECTURES["llama"], random_weights=True),
            method=Method(name="pretrain"),
            train=Train(max_steps=1, precision="bf16", activation_checkpointing=activation_checkpointing),
            dims=ParallelDims(world_size=1, strategy="none"),
            seed=0,
            device=torch.device("cuda"),
        )
        backward(model, [rows], 1.0, 0.0)
        found.append([p.grad.float() for p in model.module.parameters() if p.grad is not None])
    for again, first in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(again, first, rtol=1e-2, atol=1e-2 * first.abs().max().item())
