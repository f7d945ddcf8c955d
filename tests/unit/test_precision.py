"""In which dtype what is kept, and settings of precision, memory, kernels and optimizer that cannot work."""

# ruff: noqa: E501 (messages in whole)

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dayzero.config import Method
from dayzero.console import log
from dayzero.engine.activation_checkpointing import apply_activation_checkpointing
from dayzero.engine.compiling import compile_layers, keep_compiled
from dayzero.engine.document_attention import recalled
from dayzero.engine.lora_linear import fuse_lora
from dayzero.engine.loss import CausalLMWithLoss
from dayzero.engine.model import ModelSource
from dayzero.engine.structure import find_layers
from dayzero.engine.weights import Weights
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from tests.tiny import ARCHITECTURES
from tests.unit.test_document_attention import model_of, rows
from tests.unit.test_experiment import GOOD, mistakes


def built(dtype: torch.dtype) -> Any:
    source = ModelSource(directory=None, architecture=ARCHITECTURES["llama"], random_weights=True)
    weights = Weights(source, source.config(), Method(name="pretrain"), 0, dtype=dtype)
    model = weights.empty_model()
    weights.load(model, model, torch.device("cpu"))
    return model


def test_a_bf16_model_has_the_rotary_tables_of_float32() -> None:
    low, full = built(torch.bfloat16), built(torch.float32)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    for name, parameter in full.named_parameters():
        assert torch.equal(low.get_parameter(name), parameter.bfloat16()), name
    assert dict(low.named_buffers()).keys() == dict(full.named_buffers()).keys()
    for name, buffer in full.named_buffers():
        assert low.get_buffer(name).dtype == torch.float32
        assert torch.equal(low.get_buffer(name), buffer), name
    places, probe = torch.arange(200).unsqueeze(0), torch.zeros(1)
    for got, want in zip(low.model.rotary_emb(probe, places), full.model.rotary_emb(probe, places), strict=True):
        assert torch.equal(got, want)


class Counted(nn.Module):
    """A layer that counts how often its elementwise part and its products run."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(4)])
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for linear in self.linears:
            x = linear(x).tanh()
        return x


@pytest.mark.parametrize(
    ("setting", "calls", "products"),
    [("none", [1, 1, 1], 12), ("full", [2, 2, 2], 24), ("every_2", [2, 1, 2], 20), ("selective", [2, 2, 2], 18)],
)
def test_what_is_computed_again(setting: str, calls: list[int], products: int) -> None:
    """Of twelve products in the first pass: checkpointed layers repeat theirs, selective ones every second."""
    torch.manual_seed(0)
    layers = nn.ModuleList([Counted() for _ in range(3)])
    x = torch.randn(2, 8)

    def gradients() -> list[torch.Tensor]:
        layers.zero_grad()
        out = x
        for layer in layers:
            layer.calls = 0  # type: ignore[assignment]
            out = layer(out)
        out.sum().backward()
        return [p.grad.clone() for p in layers.parameters() if p.grad is not None]

    want = gradients()
    apply_activation_checkpointing(layers, setting)
    with Calls() as counted:
        got = gradients()
    assert [layer.calls for layer in layers] == calls
    backward = 12 + 11  # a gradient of W for each linear, one of x for all but the first
    assert counted.names.count("aten.mm.default") - backward == products
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_of_adapted_products_every_second_large_one_is_computed_again() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "1", "2", "3"]), layer)
    assert fuse_lora(layer) == 4
    x = torch.randn(3, 64, requires_grad=True)
    found = []
    for setting in ("none", "full", "selective"):
        again = copy.deepcopy(layer)
        apply_activation_checkpointing([again], setting)
        with Calls() as calls:
            (gradient,) = torch.autograd.grad(again(x).square().sum(), x)
        found.append((gradient, calls.names.count("dayzero.sum_of_products.default")))
    assert all(torch.equal(gradient, found[0][0]) for gradient, _ in found)
    assert [count for _, count in found] == [8, 12, 10]  # four forward, four backward, and those made again


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_layer_that_is_no_single_graph_is_compiled_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Breaking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x + 1

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **{**k, "backend": "eager"}))
    layer = Breaking()
    compile_layers([layer])
    for _ in range(2):
        assert torch.equal(layer(torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize("around", [None, recalled])
@pytest.mark.parametrize("setting", ["none", "full", "selective"])
def test_a_checkpointed_layer_is_compiled_into_one_graph(
    setting: str, around: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Not passed over: the compiler must see into what is computed again. Nor does it take contexts of attention's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    graphs: list[int] = []

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).tanh())

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(sum(len(m.graph.nodes) for m in graph.modules() if hasattr(m, "graph")))
        return graph.forward

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **{**k, "backend": backend}))
    torch.manual_seed(0)
    layer = Layer()
    x = torch.randn(2, 8)
    layer(x).sum().backward()
    want = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    apply_activation_checkpointing([layer], setting, around)
    compile_layers([layer])
    layer(x).sum().backward()
    assert len(graphs) == 1
    assert graphs[0] > 3
    for parameter, gradient in zip(layer.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-7)


def test_what_is_compiled_is_kept_in_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert keep_compiled() == tmp_path / "dayzero" / "compiled"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "dayzero" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    assert keep_compiled() == Path("/elsewhere")
    elsewhere = str(tmp_path / Path(default_cache_dir()).name)  # what torch itself puts there, under another TMPDIR
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", elsewhere)
    assert keep_compiled() == tmp_path / "dayzero" / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", elsewhere)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # nothing can be kept there
    assert keep_compiled() == Path(default_cache_dir())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()
    assert "set XDG_CACHE_HOME or TORCHINDUCTOR_CACHE_DIR to a folder that can be written" in caplog.messages[-1]


COMPILED = """
import torch
from dayzero.engine.compiling import compile_layers
from torch._dynamo.utils import counters

class Layer(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x).tanh()

layer = Layer(4, 4)
compile_layers([layer])
layer(torch.ones(2, 4)).sum().backward()
found = counters["aot_autograd"]
print(found["autograd_cache_hit"], found["autograd_cache_miss"])
"""


def test_a_restart_finds_what_was_compiled(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    said = [
        subprocess.run([sys.executable, "-c", COMPILED], env=environment, text=True, check=True, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [done.stdout.split() for done in said] == [["0", "1"], ["1", "0"]]
    assert list((tmp_path / "dayzero/compiled").iterdir())


def test_selective_checkpointing_of_a_real_model() -> None:
    model = model_of("llama")
    ids, positions = rows([[9, 7], [16]])
    found = []
    for setting in ("none", "selective"):
        apply_activation_checkpointing(find_layers(model), setting)
        model.zero_grad()
        loss = CausalLMWithLoss(model)(ids, ids, positions)
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(found[0][0], found[1][0])
    for got, want in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


CANNOT_WORK = {
    "train.optimizer.name: sgd": "train.optimizer.name = 'sgd': expected one of adamw, muon, adafactor, adamw8bit",
    "train.lr_scheduler.name: step": "train.lr_scheduler.name = 'step': expected one of cosine, linear, constant, wsd",
    "train.activation_checkpointing: some": "train.activation_checkpointing = 'some': expected text like none, full, "
    "selective, every_2",
    "{train: {optimizer: {state_dtype: bfloat16, implementation: fused}}}": "train.optimizer.implementation = 'fused': "
    "moments in bfloat16 (state_dtype) of weights in float32 are not for torch's fused AdamW: use auto",
    "{train.precision: bf16_pure, parallelism: {strategy: ddp, dp_replicate: 2}}": "train.precision = 'bf16_pure': bf16_pure "
    "is FSDP2's, but parallelism.strategy is ddp: use fsdp2",
    "{train.cpu_offload: true, parallelism: {strategy: none}}": "train.cpu_offload = True: true is FSDP2's, but "
    "parallelism.strategy is none: use fsdp2",
    "{train.attention: documents, parallelism.cp: 2}": "train.attention = 'documents': parallelism.cp 2 has its own "
    "attention: use auto",
    "{train: {attention: documents, compile: true}}": "train.attention = 'documents': documents would be compiled anew for "
    "each batch: use sdpa or no compile",
    "{train.kernels: liger, parallelism.tp: 2}": "train.kernels = 'liger': Liger's norms cannot be split by parallelism.tp 2: "
    "use auto",
    "{train.fp8: {}, method.lora.dora: true}": "train.fp8 = {}: method.lora.dora reads whole weights, of which 8 bits are left: turn one off",
    "{train.fp8: {}, parallelism.tp: 2}": "train.fp8 = {}: is not tried with parallelism.tp 2: use dp_shard, or set it to null",
    "{train: {fp8: {}, precision: fp32}}": "train.fp8 = {}: multiplies into bfloat16, but train.precision is fp32: use bf16",
    "{train.fp8: {backend: transformer_engine, recipe: rowwise}}": "train.fp8.recipe = 'rowwise': backend transformer_engine "
    "has tensorwise, delayed, block, mxfp8: use one of them",
    "{train: {fp8: {backend: transformer_engine}, activation_checkpointing: full}}": "train.activation_checkpointing = 'full': "
    "computes again without transformer_engine's scales: use none, or train.fp8.backend torchao",
    "{train.fp8: {recipe: rowwise, all_gather: true}}": "train.fp8.all_gather = True: needs recipe tensorwise, strategy fsdp2 "
    "and no cpu_offload, but they are rowwise, fsdp2 and False: turn it off",
}


@pytest.mark.parametrize("setting", CANNOT_WORK)
def test_what_cannot_work_is_said_in_one_line(tmp_path: Path, setting: str) -> None:
    braced = setting if setting.startswith("{") else "{" + setting + "}"
    head, line = mistakes(tmp_path, GOOD.replace("a: {}", f"a: {braced}"))
    assert head == "1 mistake in the configuration:"
    assert CANNOT_WORK[setting] in line


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "{train.optimizer: {name: adafactor, eps: 1.0}}",
            "train.optimizer.eps = 1.0: only train.optimizer.name adamw or muon",
        ),
        ("{train.optimizer.muon.lr: 1.0}", "train.optimizer.muon.lr = 1.0: only train.optimizer.name muon uses it"),
        ("{train.optimizer: {name: adamw8bit, state_dtype: float32}}", "train.optimizer.state_dtype = 'float32': only"),
    ],
)
def test_settings_that_the_optimizer_does_not_use(tmp_path: Path, setting: str, said: str) -> None:
    assert said in mistakes(tmp_path, GOOD.replace("a: {}", f"a: {setting}\n  b: {{}}"))[1]
