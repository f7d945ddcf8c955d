"""The FLOP formula against torch's own count of what a forward and backward pass execute, and against hand sums."""

from __future__ import annotations

import pytest
import torch
from dayzero.config import Lora
from dayzero.engine.chunks import IGNORE
from dayzero.engine.device_peaks import peak_flops, peak_of_name
from dayzero.engine.flops import StepFlops, count_flops, visible_pairs
from dayzero.engine.lora import inject_lora
from dayzero.engine.loss import CausalLMWithLoss, cross_entropy
from dayzero.engine.metrics import speed
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny import ARCHITECTURES, VOCAB_SIZE

ROWS, TOKENS = 2, 24
WINDOWED = {
    "model_type": "gemma2", "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
}  # fmt: skip
LATENT = {
    "model_type": "deepseek_v3", "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64,
    "moe_intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}  # fmt: skip
SHAPES = {**ARCHITECTURES, "gemma2": WINDOWED, "deepseek_v3": LATENT}


def tiny(name: str, lora: Lora | None, device: str) -> PreTrainedModel:
    fields = dict(SHAPES[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.use_cache = False
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
        if lora:
            inject_lora(model, lora)
    return model


def executed(model: PreTrainedModel, labels: torch.Tensor) -> int:
    """What torch counts of the matrix products in one step; eager attention multiplies all pairs."""
    ids = torch.randint(0, VOCAB_SIZE, labels.shape)
    with FlopCounterMode(display=False) as counter:
        positions = torch.arange(labels.shape[1]).expand_as(labels)
        CausalLMWithLoss(model, loss=cross_entropy)(ids, labels, positions).backward()
    return counter.get_total_flops()


SOME = Lora(rank=4, targets=["q_proj", "v_proj"])


# stablelm's attention is its own and counted by the config, which knows nothing of keys without gradient
@pytest.mark.parametrize(
    ("name", "lora"),
    [(name, lora) for name in ("llama", "qwen3", "opt", "gemma2") for lora in (None, Lora(rank=4), SOME)]
    + [("stablelm", None), ("stablelm", Lora(rank=4))],
    ids=str,
)
def test_equals_torchs_count_for_full_training_and_lora(name: str, lora: Lora | None) -> None:
    flops = count_flops(tiny(name, lora, "meta"))
    pairs = dict.fromkeys(flops.per_pair, ROWS * TOKENS * TOKENS)
    counted = flops.of(ROWS * TOKENS, ROWS * TOKENS, pairs)
    labels = torch.randint(0, VOCAB_SIZE, (ROWS, TOKENS))
    # rotary tables are products too, of one element for each angle
    assert executed(tiny(name, lora, "cpu"), labels) == pytest.approx(counted, rel=2e-3)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_of_experts_the_chosen_ones_count(name: str) -> None:
    model = tiny(name, None, "meta")
    flops = count_flops(model)
    config = model.config
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    embedding = model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight.numel()
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1) - embedding - head - experts
    count = next(p.shape[0] for n, p in model.named_parameters() if ".experts." in n)
    active = matrices + experts * config.num_experts_per_tok / count
    assert flops.per_token == pytest.approx(6 * active)
    assert flops.per_label == pytest.approx(6 * head)


def test_latent_attention_counts_its_own_widths() -> None:
    flops = count_flops(tiny("deepseek_v3", None, "meta"))
    # queries and keys 8 + 4 wide, values 12, four heads, three layers, three products each of scores and values
    assert flops.per_pair == {None: 3 * 3 * 2 * 4 * (12 + 12)}


def test_lora_is_about_two_thirds_and_the_first_layer_needs_no_gradient_of_its_input() -> None:
    full, lora = (count_flops(tiny("qwen3", method, "meta")) for method in (None, Lora(rank=1)))
    assert 0.62 < lora.per_token / full.per_token < 0.75
    assert lora.per_label == pytest.approx(full.per_label * 2 / 3)
    without_head = count_flops(tiny("qwen3", Lora(rank=1, targets=["layers.3.mlp.down_proj"]), "meta"))
    assert without_head.per_token < 0.4 * full.per_token  # nothing before the last matrix is trained: forward only


def test_adapters_of_fused_experts_count_as_small_as_they_are() -> None:
    lora = Lora(rank=2, targets="all-linear")
    with_experts, dense = count_flops(tiny("mixtral", lora, "meta")), count_flops(tiny("mixtral", None, "meta"))
    assert 0.6 < with_experts.per_token / dense.per_token < 0.95


def test_pairs_are_causal_within_documents_and_windows() -> None:
    positions = torch.tensor([0, 1, 2, 3, 0, 1])
    assert visible_pairs(positions) == 1 + 2 + 3 + 4 + 1 + 2
    assert visible_pairs(positions, 2) == 1 + 2 + 2 + 2 + 1 + 2


def test_sliding_windows_are_told_apart() -> None:
    assert set(count_flops(tiny("gemma2", None, "meta")).per_pair) == {8, None}


def test_a_batch_counts_real_tokens_documents_and_labels() -> None:
    flops = StepFlops(per_token=2.0, per_label=10.0)
    flops.per_pair[None] = 1.0
    micro = {"position_ids": torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]), "lengths": torch.tensor([4, 2])}
    labels = torch.tensor([[1, IGNORE, 1, IGNORE, IGNORE], [1, IGNORE, IGNORE, IGNORE, IGNORE]])
    assert flops.of_batch([micro], int((labels != IGNORE).sum())) == 2 * 6 + 10 * 3 + (1 + 2 + 1 + 2) + (1 + 2)


def test_a_model_that_does_not_run_without_values_is_counted_by_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", None, "meta")
    seen = count_flops(model)

    def forward(*_: object, **__: object) -> None:
        raise RuntimeError("no values")

    monkeypatch.setattr(type(model), "forward", forward)
    by_structure = count_flops(model)
    assert by_structure.per_token == pytest.approx(seen.per_token, rel=1e-6)
    assert by_structure.per_pair == seen.per_pair


@pytest.mark.parametrize("name", ["mamba"])
def test_models_without_attention_have_no_pairs(name: str) -> None:
    flops = count_flops(tiny(name, None, "meta"))
    assert flops.per_token > 0
    assert not flops.per_pair


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 990.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
    ],
)
def test_a_devices_peak_is_found_by_its_name(name: str, tflops: float) -> None:
    assert peak_of_name(name) == tflops * 1e12


def test_mfu_is_what_was_needed_of_what_could_have_been_done_and_null_without_a_known_peak() -> None:
    assert speed(100, 1.5, 0.5, 4, 1.6e15, 4e14)["mfu"] == pytest.approx(0.5)
    assert speed(100, 1.5, 0.5, 4, 0.0, None)["mfu"] is None
    assert peak_of_name("NVIDIA GeForce GTX 1080") is None
    assert peak_of_name("NVIDIA H200 MIG 1g.18gb") is None, "a slice is not the whole chip"
    assert peak_flops(torch.device("cpu"), "bf16") is None
