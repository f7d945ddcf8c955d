"""A model written tensor by tensor is what save_pretrained writes of a whole one, in far less memory."""

from __future__ import annotations

import copy
import ctypes
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from dayzero.config import Lora, Method
from dayzero.engine.consolidate import write_model
from dayzero.engine.export import (
    compare_with_training,
    logit_difference,
    logits_of,
    own_rounding,
    reload,
    reloaded_logits,
    streamed_logits,
)
from dayzero.engine.lora import save_adapter
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.trained_weights import TrainedWeights
from dayzero.errors import ConfigError
from dayzero.stages import export
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.distributed.loading import MODELS, resident
from tests.tiny import VOCAB_SIZE
from tests.unit.test_weights import save

INPUT = torch.arange(1, 25).unsqueeze(0) % VOCAB_SIZE
NONE = Method(name="none")


def write(trained: TrainedWeights, folder: Path, dtype: torch.dtype, size: str = "5GB") -> Path:
    trained.model.config.use_cache = True
    write_model(folder, trained.model, trained.read, dtype, size, trained.weights.tied)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same_weights(got: Path, want: Path) -> None:
    ours, theirs = tensors(got), tensors(want)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral", "qwen3_moe", "gpt2", "deepseek_v3", "jamba"])
def test_as_save_pretrained(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(model_type, tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    for parameter in whole.parameters():
        parameter.data = parameter.data.to(dtype)
    trained = TrainedWeights(ModelSource(directory=tmp_path / "base"), None, NONE, 0, None)
    for size in ("5GB", "30KB"):
        got, want = tmp_path / f"got{size}", tmp_path / f"want{size}"
        whole.save_pretrained(want, max_shard_size=size)
        write(trained, got, dtype, size)
        same_weights(got, want)
        config, expected = (json.loads((path / "config.json").read_text()) for path in (got, want))
        assert config == expected
    one = "model.safetensors"
    assert (tmp_path / "got5GB" / one).read_bytes() == (tmp_path / "want5GB" / one).read_bytes()
    index, expected = (json.loads((tmp_path / f"{x}30KB/{one}.index.json").read_text()) for x in ("got", "want"))
    assert index["metadata"] == expected["metadata"]
    assert index["weight_map"].keys() == expected["weight_map"].keys()
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "got30KB" / file)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens"]])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_adapters_are_merged_as_peft_does(model_type: str, targets: Any, tmp_path: Path) -> None:
    if model_type == "gpt2" and targets != "all-linear":
        targets = ["c_attn", "wte"]
    # an embedding that is the head too is not adapted
    base = save(model_type, tmp_path / "base", **({} if targets == "all-linear" else {"tie_word_embeddings": False}))
    method = Method(name="lora", lora=Lora(rank=4, targets=targets))
    source = ModelSource(directory=base)
    adapted = build_model(source, source.config(), method, 0, meta=False)
    torch.manual_seed(1)
    adapters = {n: torch.randn_like(p) * 0.1 for n, p in adapted.named_parameters() if "lora_" in n}
    save_adapter(tmp_path / "train/adapter", method.lora, adapters, base_model=str(base))
    (tmp_path / "train/summary.json").write_text("{}")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, str(tmp_path / "train/adapter")).merge_and_unload()
    merged.save_pretrained(tmp_path / "want")
    trained = TrainedWeights(source, None, method, 0, tmp_path / "train")
    same_weights(write(trained, tmp_path / "got", torch.float32), tmp_path / "want")
    changed = [n for n, t in tensors(tmp_path / "got").items() if not torch.equal(t, tensors(base)[n])]
    assert len(changed) >= 3


def test_a_checkpoint_and_random_weights(tmp_path: Path) -> None:
    source = ModelSource(directory=None, architecture=MODELS["llama"])
    method = Method(name="pretrain")
    model = build_model(source, source.config(), method, 0, meta=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    dcp.save({"model": state}, checkpoint_id=tmp_path / "train/checkpoints/step_3", no_dist=True)
    (tmp_path / "train/summary.json").write_text(json.dumps({"checkpoint": "checkpoints/step_3"}))
    trained = TrainedWeights(source, None, method, 0, tmp_path / "train")
    assert torch.equal(streamed_logits(trained.model, trained.read, INPUT), logits_of(model.eval(), INPUT))
    model.save_pretrained(tmp_path / "want")
    same_weights(write(trained, tmp_path / "got", torch.float32), tmp_path / "want")
    other = ModelSource(directory=None, architecture=MODELS["gpt2"])
    says = r"--train: .*step_3 lacks transformer.* another model: give this run's own train folder"
    with pytest.raises(ConfigError, match=says):
        TrainedWeights(other, None, method, 0, tmp_path / "train")


@pytest.mark.parametrize("model_type", ["llama", "mamba", "gpt_neo", "xglm"])
def test_rounding_is_that_of_weights_alone(model_type: str) -> None:
    """Two of them keep masks and positions in buffers, which are no weights and have a dtype of their own."""
    torch.manual_seed(0)
    layers = {"attention_types": [[["global", "local"], 1]]} if model_type == "gpt_neo" else {}
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "d_model": 32, "num_layers": 2, "num_heads": 4,
             "attention_heads": 4, "ffn_dim": 64, "num_attention_heads": 4, "intermediate_size": 64}  # fmt: skip
    names = AutoConfig.for_model(model_type).to_dict().keys() | {"hidden_size", "num_attention_heads"}
    config = AutoConfig.for_model(model_type, **{n: v for n, v in sizes.items() if n in names}, **layers)
    model = AutoModelForCausalLM.from_config(config).eval()
    values = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    empty = copy.deepcopy(model).to("meta")
    logits = streamed_logits(empty, values.__getitem__, INPUT)
    assert torch.equal(logits, logits_of(model, INPUT))
    before = {name: value.clone() for name, value in values.items()}
    rounding = own_rounding(empty, values.__getitem__, INPUT, logits)
    assert rounding.shape == INPUT.shape[1:]
    assert 0 < rounding.max() < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in values.items())


def routed_evenly(tokens: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A mixture of one layer whose last `tokens` tokens have two best experts that are all but equal: its architecture,
    its weights, and the same a rounding away, where the other one is chosen."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 1,
             "initializer_range": 0.2}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes)).eval()
    seen: list[torch.Tensor] = []
    router = model.model.layers[0].mlp.gate
    handle = router.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().reshape(-1, 32)))
    logits_of(model, INPUT)
    handle.remove()
    even = seen[0][-tokens:]
    with torch.no_grad():  # far above the others for these tokens, and apart for the tokens before
        best = 50 * torch.linalg.lstsq(even.double(), torch.ones(tokens, 1).double()).solution[:, 0].float()
        basis = torch.linalg.qr(even.double().T).Q
        across = torch.randn(32).double()
        across = (across - basis @ (basis.T @ across)).float()
        router.weight[0], router.weight[1] = best + across, best - across
        assert ((seen[0] @ router.weight.T)[-tokens:].topk(2).indices <= 1).all()
    weights = {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    name = "model.layers.0.mlp.gate.weight"
    ahead = (even @ (weights[name][0] - weights[name][1])).sign().mean()
    other = {**weights, name: weights[name].clone()}
    other[name][0] -= 1e-5 * ahead * best
    return model.to("meta"), weights, other


def test_a_router_that_may_choose_either_expert_says_nothing_of_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU sums are rounded otherwise, and some token of a large mixture chooses otherwise."""
    monkeypatch.setattr("dayzero.engine.export.DRAWS", 60)  # on any processor one of them chooses otherwise
    model, weights, other = routed_evenly(1)
    logits = streamed_logits(model, weights.__getitem__, INPUT)
    trained = streamed_logits(model, other.__getitem__, INPUT)
    assert logit_difference(logits, trained) > 1e-3
    assert logit_difference(logits[:, :-1], trained[:, :-1]) < 1e-5
    found = compare_with_training(model, weights.__getitem__, INPUT, logits, trained)
    assert found.tokens == INPUT.shape[1] - 1
    assert found.difference <= found.tolerance < 2e-5
    trained[:, 3] += 2e-4 * logits.abs().max()
    damaged = compare_with_training(model, weights.__getitem__, INPUT, logits, trained)
    assert damaged.tokens == INPUT.shape[1] - 1
    assert damaged.difference == pytest.approx(2e-4, rel=0.2)
    assert damaged.tolerance < 2e-5


def test_where_too_many_tokens_say_nothing_nothing_is_exported() -> None:
    model, weights, other = routed_evenly(23)
    logits, trained = (streamed_logits(model, values.__getitem__, INPUT) for values in (weights, other))
    said = r"rounding alone moves .* [12]\d of 24 tokens .*: keep --train and train it further"
    with pytest.raises(ConfigError, match=said):
        compare_with_training(model, weights.__getitem__, INPUT, logits, trained)


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2", "mamba", "gemma2"])
def test_logits_layer_by_layer(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(model_type, tmp_path / "base")
    trained = TrainedWeights(ModelSource(directory=base), None, NONE, 0, None)
    want = logits_of(reload(base), INPUT)
    assert torch.equal(streamed_logits(trained.model, trained.read, INPUT), want)
    assert torch.equal(reloaded_logits(base, INPUT)[0], want)
    monkeypatch.setattr("dayzero.engine.export.ROOM", 0.0)
    found, how = reloaded_logits(base, INPUT)
    assert how == "layer by layer"
    assert torch.equal(found, want)


@pytest.mark.parametrize("room", [0.0, 0.5])
def test_what_a_directory_must_not_have(room: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dayzero.engine.export.ROOM", room)
    base = save("llama", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({**weights, "model.layers.9.norm.weight": torch.ones(32)}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not reload: .*unexpected_keys"):
        reloaded_logits(base, INPUT)


STORED = ("float32", "bfloat16")


def _write_measured(base: Path, target: Path, results: Any) -> None:
    malloc = ctypes.CDLL(None)
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h: freed memory goes back at once
        malloc.mallopt(option, 65536)
    for stored in ("warm", *STORED):  # first once for what is imported on the way
        directory = base / (stored if stored in STORED else STORED[0])
        trained = TrainedWeights(ModelSource(directory=directory), None, NONE, 0, None)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        write_model(target / stored, trained.model, trained.read, torch.float32, "30MB", trained.weights.tied)
        results.put(resident("VmHWM") - before)


def test_writing_holds_two_tensors(tmp_path: Path) -> None:
    """Resident memory, see tests/distributed/loading.py; 130 MB of parameters, the largest 17 MB."""
    for stored in STORED:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS["big"]), dtype=getattr(torch, stored))
        sizes = [4 * p.numel() for p in model.parameters()]
        model.save_pretrained(tmp_path / "base" / stored)
        del model
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_write_measured, args=(tmp_path / "base", tmp_path, results))
    process.start()
    _, *peaks = (results.get(timeout=400) for _ in range(1 + len(STORED)))
    process.join()
    for stored, peak in zip(STORED, peaks, strict=True):
        assert max(sizes) <= peak <= 2.2 * max(sizes) < 0.3 * sum(sizes), stored
    same_weights(tmp_path / "float32", tmp_path / "base/float32")


@pytest.mark.parametrize("difference", [0.5, float("nan")])
def test_logits_that_differ_are_said_with_a_remedy(difference: float) -> None:
    with pytest.raises(ConfigError, match=r"nothing is exported: the x logits differ by .* than 0.001 .*: do this"):
        export._require("x", difference, 1e-3, "do this")
