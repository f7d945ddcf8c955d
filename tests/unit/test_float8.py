"""8-bit floats, emulated: how far off, what is quantised once, and what is refused."""

from __future__ import annotations

from ast import literal_eval
from typing import Any

import pytest
import torch
from dayzero.config import Fp8, Lora, Method, Train
from dayzero.engine.checkpoint import state_of
from dayzero.engine.float8 import (
    FrozenFloat8Linear,
    convert_to_float8,
    frozen_float8,
    product,
    require_float8,
    to_float8,
)
from dayzero.engine.gathering import float32_logits, whole_weights
from dayzero.engine.loss import CausalLMWithLoss
from dayzero.engine.model import ModelSource, build_model, count_parameters
from dayzero.engine.optimizer import build_optimizer
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.transformer_engine import float8_autocast, is_extra_state
from dayzero.engine.weights import Weights
from dayzero.errors import ConfigError
from torch import nn

from tests.tiny import ARCHITECTURES
from tests.unit import transformer_engine_double

LORA = Method(name="lora", lora=Lora(rank=4))
FULL = Method(name="pretrain")


def source_of(**fields: Any) -> ModelSource:
    architecture = {**ARCHITECTURES["llama"], **fields}
    return ModelSource(directory=None, architecture=architecture, random_weights=True)


def both(method: Method, fp8: Fp8) -> tuple[Any, Any]:
    """The same model in float32 and converted, with the same values."""
    source = source_of()
    plain = build_model(source, source.config(), method, 0, meta=False)
    weights = Weights(source, source.config(), method, 0)
    converted = weights.empty_model()
    convert_to_float8(converted, fp8)
    weights.load(converted, converted, torch.device("cpu"))
    return plain, converted


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 128, (2, 32), generator=generator)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as after some steps: at first it is zero, and so is lora_A's gradient
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 50)
    loss = CausalLMWithLoss(model)(ids, ids, torch.arange(32).expand(2, -1))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_the_emulated_loss_is_within_two_percent(method: Method, recipe: Any) -> None:
    if method is FULL:
        pytest.importorskip("torchao")
    plain, converted = both(method, Fp8(recipe=recipe, emulate=True))
    want, wanted = loss_and_gradients(plain)
    got, gradients = loss_and_gradients(converted)
    assert got == pytest.approx(want, rel=2e-2)
    assert got != want
    assert gradients.keys() == wanted.keys()
    size = torch.stack([g.norm() for g in wanted.values()]).norm()
    off = torch.stack([(gradients[n] - g).norm() for n, g in wanted.items()]).norm()
    assert off <= 0.15 * size
    assert count_parameters(converted) == count_parameters(plain)


class Rounded(torch.autograd.Function):
    """A frozen linear layer in float32 whose factors are rounded to 8 bits: what the layers should compute, written
    down once more. By tensor the gradient has two bits of mantissa; by row each output's scale goes into it first."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, by_row: bool) -> torch.Tensor:
        ctx.by_row, ctx.weight = by_row, weight
        return rounded(x, by_row) @ rounded(weight, by_row).t()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        if not ctx.by_row:
            return rounded(gradient, False, torch.float8_e5m2) @ rounded(ctx.weight, False), None, None
        scale = ctx.weight.abs().amax(1) / 448
        codes = rounded(ctx.weight, True) / scale.unsqueeze(1)
        return rounded(gradient * scale, True) @ codes, None, None


def rounded(x: torch.Tensor, by_row: bool, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    size = x.abs().amax(-1, keepdim=True) if by_row else x.abs().max()
    scale = size.clamp(min=1e-12) / torch.finfo(dtype).max
    return (x / scale).to(dtype).float() * scale


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_model_computes_what_rounded_factors_give(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and the gradients of the adapters, against float32 products of rounded factors in every frozen layer."""
    plain, converted = both(LORA, Fp8(recipe=recipe, emulate=True))
    got, gradients = loss_and_gradients(converted)
    frozen = set(frozen_float8(converted))
    for name, module in plain.named_modules():
        if name in frozen:
            flat = lambda x, m=module: Rounded.apply(x.flatten(0, -2), m.weight.detach(), recipe == "rowwise")  # noqa: E731
            monkeypatch.setattr(module, "forward", lambda x, f=flat: f(x).unflatten(0, x.shape[:-1]))
    want, wanted = loss_and_gradients(plain)
    assert got == pytest.approx(want, rel=1e-3)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= 2e-2 * gradient.norm(), name


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_frozen_linear_is_quantised_once_and_right_in_value_and_gradient(recipe: Any) -> None:
    """Against a plain product with the rounded weight: what is left is the rounding of what flows through."""
    torch.manual_seed(0)
    plain = nn.Linear(64, 48)
    linear = FrozenFloat8Linear(plain, Fp8(recipe=recipe, emulate=True))
    linear.quantize(plain.weight)
    rounded = linear.weight_float8.float() * linear.weight_scale
    assert (rounded - plain.weight).norm() <= 0.04 * plain.weight.norm()
    x, upstream = torch.randn(3, 7, 64), torch.randn(3, 7, 48)
    outputs = []
    for weight in (None, rounded):
        leaf = x.clone().requires_grad_()
        out = linear(leaf) if weight is None else nn.functional.linear(leaf, weight, plain.bias)
        (gradient,) = torch.autograd.grad(out, leaf, upstream)
        outputs.append((out.detach(), gradient))
    for got, want in zip(*outputs, strict=True):
        assert (got - want).norm() <= (0.04 if recipe == "rowwise" else 0.08) * want.norm()
    assert not [name for name, _ in linear.named_parameters() if name != "bias"]
    assert not [name for name in linear.state_dict() if name != "bias"]


def test_codes_and_scales_give_back_the_values() -> None:
    x = torch.randn(5, 64) * torch.logspace(-3, 3, 5).unsqueeze(1)
    codes, scale = to_float8(x, torch.float8_e4m3fn, by_row=True)
    assert ((codes.float() * scale - x).abs() <= x.abs() / 16 + scale / 512).all()  # 3 bits of mantissa
    codes, scale = to_float8(torch.zeros(2, 16), torch.float8_e4m3fn, by_row=False)
    assert not codes.float().any()
    assert scale > 0


def test_the_base_of_adapters_is_frozen_in_8_bits_and_the_adapters_are_not() -> None:
    _, converted = both(LORA, Fp8(emulate=True))
    names = set(frozen_float8(converted))
    assert "model.layers.0.self_attn.q_proj.base_layer" in names
    assert len(names) == 4 * 7
    trained = {n for n, p in converted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 4 * 7


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_sizes_that_are_not_multiples_of_16(method: Method) -> None:
    source = source_of(intermediate_size=40)
    model = build_model(source, source.config(), method, 0, meta=True)
    with pytest.raises(
        ConfigError, match=r"multiples of 16: model\.layers\.0\.mlp\.gate_proj 40 x 32, .* and 8 more: leave them out"
    ) as refused:
        convert_to_float8(model, Fp8(emulate=True))
    remedy = str(refused.value).rpartition("train.fp8.skip: ")[2]
    convert_to_float8(model, Fp8(emulate=True, skip=literal_eval(remedy)))


def test_what_is_skipped_stays() -> None:
    source = source_of(intermediate_size=40)
    model = build_model(source, source.config(), LORA, 0, meta=True)
    convert_to_float8(model, Fp8(emulate=True, skip=["gate_proj", "up_proj", "down_proj"]))
    assert len(frozen_float8(model)) == 4 * 4
    for name in ("gate_porj", "lm_head"):
        with pytest.raises(
            ConfigError, match=rf"train.fp8.skip '{name}' names no linear .* of this model are down_proj, "
        ):
            convert_to_float8(model, Fp8(emulate=True, skip=["gate_proj", name]))
    with pytest.raises(ConfigError, match="no linear layer is left"):
        convert_to_float8(model, Fp8(emulate=True, skip=["gate_proj", "up_proj", "down_proj"]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_without_a_gpu_only_emulated() -> None:
    require_float8(Fp8(emulate=True))
    with pytest.raises(ConfigError, match=r"needs an NVIDIA GPU of compute capability 8\.9 or later"):
        require_float8(Train(max_steps=1, fp8=Fp8()).fp8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("delayed", "DelayedScaling"),
        ("tensorwise", "Float8CurrentScaling"),
        ("block", "Float8BlockScaling"),
        ("mxfp8", "MXFP8BlockScaling"),
    ],
)
@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_transformer_engines_modules_run_under_its_autocast(
    method: Method, recipe: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a test double: which modules are swapped, with which parameters, and under which recipe they run."""
    transformer_engine_double.install(monkeypatch)
    fp8 = Fp8(backend="transformer_engine", recipe=recipe)
    plain, converted = both(method, fp8)
    assert [n for n, _ in converted.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert sum(isinstance(m, transformer_engine_double.Linear) for m in converted.modules()) == 4 * 7
    want, wanted = loss_and_gradients(plain)
    with float8_autocast(fp8):
        got, gradients = loss_and_gradients(converted)
    assert got == want
    assert gradients.keys() == wanted.keys()
    assert transformer_engine_double.seen == [name] * 4 * 7
    transformer_engine_double.install(monkeypatch, [transformer_engine_double.DelayedScaling])
    with pytest.raises(ConfigError, match="recipe mxfp8: this transformer-engine has no MXFP8BlockScaling"):
        float8_autocast(Fp8(backend="transformer_engine", recipe="mxfp8"))


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_transformer_engines_extra_states_are_not_weights(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in checkpoints nor where the logits for the export are computed."""
    transformer_engine_double.install(monkeypatch)
    fp8 = Fp8(backend="transformer_engine", recipe="delayed")
    model = ParallelModel(
        source=source_of(), method=method, train=Train(max_steps=1, precision="bf16", fp8=fp8),
        dims=ParallelDims(strategy="none", world_size=1), seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    assert any(is_extra_state(name) for name in model.module.state_dict())
    optimizer = build_optimizer(model.module, model.train.optimizer)
    saved = state_of(model.module, optimizer)
    assert not any(is_extra_state(name) for name in saved)
    assert {f"model.{n}" for n, p in model.module.named_parameters() if p.requires_grad} <= set(saved)
    assert not any(is_extra_state(name) for name in whole_weights(model))
    ids = torch.arange(20).unsqueeze(0)
    plain = build_model(model.source, model.source.config(), method, 0, meta=False).eval()
    got = float32_logits(model, ids, ids)
    torch.testing.assert_close(got, plain(input_ids=ids, position_ids=ids).logits.detach())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_without_transformer_engine() -> None:
    with pytest.raises(ConfigError, match=r"no NVIDIA GPU that torch can use and the package is not inst.*: use t"):
        require_float8(Fp8(backend="transformer_engine"))


@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_factors_may_lie_in_memory_in_any_way(turned: tuple[bool, bool]) -> None:
    """LFM2 and Mamba turn what their linears take and give. On the meta device torch checks what a GPU would."""
    shapes = (32, 64), (64, 48)
    a, b = (
        torch.empty(*(reversed(shape) if t else shape), device="meta", dtype=torch.float8_e4m3fn)
        for shape, t in zip(shapes, turned, strict=True)
    )
    a, b = (x.t() if t else x for x, t in zip((a, b), turned, strict=True))
    scale = torch.empty((), device="meta")
    assert product(a, scale, b, scale, torch.bfloat16, emulate=False).shape == (32, 48)
