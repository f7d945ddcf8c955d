"""Where models are cut into pipeline stages, and what cannot be cut: refused in one line, before any process exists."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from math import prod
from typing import Any

import pytest
import torch
from dayzero.config import Lora, Method
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.parallel_dims import ParallelDims, SizeError
from dayzero.engine.pipeline_cut import anatomy, balanced, check_pipeline, cut_layers
from dayzero.errors import ConfigError
from torch import nn

from tests.tiny import ARCHITECTURES

BLOOM = {"model_type": "bloom", "vocab_size": 128, "hidden_size": 32, "n_layer": 3, "n_head": 4}
GPT2 = {"model_type": "gpt2", "vocab_size": 128, "n_embd": 32, "n_layer": 3, "n_head": 4}
MOE = {"model_type": "qwen3_moe", **{k: v for k, v in ARCHITECTURES["llama"].items() if k != "model_type"},
       "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
       "tie_word_embeddings": False}  # fmt: skip


def empty(architecture: str | dict[str, Any], method: str = "full", **changed: Any) -> Any:
    fields = ARCHITECTURES[architecture] if isinstance(architecture, str) else architecture
    source = ModelSource(directory=None, architecture={**fields, **changed})
    return build_model(source, source.config(), Method(name=method), seed=0, meta=True)


@pytest.mark.parametrize(
    ("architecture", "method", "first", "last", "tied"),
    [
        ("llama", "full", {"model.embed_tokens"}, {"model.norm", "lm_head"},
         (("model.embed_tokens.weight", "lm_head.weight"),)),
        ("qwen3", "lora", {"model.embed_tokens"}, {"model.norm", "lm_head"}, ()),
        (GPT2, "full", {"transformer.wte", "transformer.wpe"}, {"transformer.ln_f", "lm_head"},
         (("transformer.wte.weight", "lm_head.weight"),)),
        (BLOOM, "full", {"transformer.word_embeddings", "transformer.word_embeddings_layernorm"},
         {"transformer.ln_f", "lm_head"}, (("transformer.word_embeddings.weight", "lm_head.weight"),)),
        (MOE, "full", {"model.embed_tokens"}, {"model.norm", "lm_head"}, ()),
        ("mixtral", "lora", {"model.embed_tokens"}, {"model.norm", "lm_head"}, ()),
        ("mamba", "full", {"backbone.embeddings"}, {"backbone.norm_f", "lm_head"},
         (("backbone.embeddings.weight", "lm_head.weight"),)),
    ],
)  # fmt: skip
def test_what_belongs_to_the_ends_is_found(
    architecture: Any, method: str, first: set[str], last: set[str], tied: tuple[Any, ...]
) -> None:
    model = empty(architecture, method)
    before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    found = anatomy(model, 2)
    assert (set(found.first), set(found.last), found.tied) == (first, last, tied)
    assert (found.hidden_size, found.vocab_size) == (32, 128)
    assert found.output == ((tuple, 2) if architecture is BLOOM else (torch.Tensor, 1))
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before  # only a copy was tried


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (r".*layers\.3\..*proj", "the layers 0 to 1, which are one stage: let method.lora.targets reach some of them"),
        (r".*layers\.0\..*proj", "parallelism.pp 2: nothing is trained in the layers 2 to 3,"),
        (r".*layers\.[02]\..*proj", None),
    ],
)
def test_a_stage_without_adapters(targets: str, said: str | None) -> None:
    source = ModelSource(directory=None, architecture=ARCHITECTURES["llama"])
    method = Method(name="lora", lora=Lora(targets=targets))
    model = build_model(source, source.config(), method, seed=0, meta=True)
    sizes = ParallelDims(world_size=2, strategy="fsdp2", pp=2)
    with pytest.raises(ConfigError, match=said) if said else nullcontext():
        check_pipeline(model, sizes)


def test_stages_are_balanced_by_their_parameters() -> None:
    assert balanced([1] * 8, 0, 0, 4) == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    assert balanced([10] * 6, 30, 30, 2) == [range(0, 3), range(3, 6)]
    assert balanced([10] * 6, 0, 30, 3) == [range(0, 2), range(2, 5), range(5, 6)]
    assert balanced([1, 1, 100, 1], 50, 0, 3) == [range(0, 2), range(2, 3), range(3, 4)]
    assert balanced([5, 5], 1000, 1000, 2) == [range(0, 1), range(1, 2)]


def test_embedding_and_head_count_where_they_are_held() -> None:
    model = empty("llama", num_hidden_layers=6, vocab_size=512)  # a layer has 9,280 parameters, each end 16,384
    assert cut_layers(model, anatomy(model, 3), 3) == [range(0, 2), range(2, 5), range(5, 6)]


def no_change(model: Any) -> None:
    pass


def same_layer_twice(model: Any) -> None:
    model.model.layers[2] = model.model.layers[0]


def shared_part(model: Any) -> None:
    model.model.layers[2].mlp = model.model.layers[0].mlp


class Looped(nn.Module):
    """Calls a layer twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.layer(self.layer(hidden, **options), **options)


class Leaping(nn.Module):
    """A norm that adds what the first layer returned."""

    def __init__(self, norm: nn.Module, first: nn.Module) -> None:
        super().__init__()
        self.norm, self.kept = norm, []
        first.register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, output: torch.Tensor) -> None:
        self.kept.append(output)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden) + self.kept[-1]


def scaled_between(model: Any) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))


def head_as_layer(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.empty(128, 32, device="meta"))
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(torch.empty(32, 32, device="meta"))
    model.model.layers[1].mlp.extra = model.model.embed_tokens


@pytest.mark.parametrize(
    ("architecture", "change", "reason"),
    [
        ("llama", same_layer_twice, r"layer \d is called several times|layer 2 does not take just what layer 1"),
        ("llama", shared_part, "layers 0 and 2 share model.layers.0.mlp.gate_proj.weight"),
        ("llama", scaled_between, "layer 1 does not take just what layer 0 returns"),
        ("llama", head_as_layer, r"(model\.embed_tokens\.weight|model\.layers\.1\.mlp\.extra\.weight) is used outside"),
        ({"model_type": "zamba2", "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 4,
          "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_attention_heads": 4, "mamba_d_state": 4,
          "n_mamba_heads": 4, "mamba_ngroups": 1, "use_mem_rope": False}, no_change, "layer 1 also uses model.embed"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_cut_are_refused(architecture: Any, change: Callable[[Any], None], reason: str) -> None:
    model = empty(architecture)
    change(model)
    with pytest.raises(ConfigError, match=rf"^parallelism\.pp 2: \w+ cannot be cut: .*({reason})") as refused:
        anatomy(model, 2)
    assert str(refused.value).endswith("; use dp_shard or tp")
    assert "\n" not in str(refused.value)


def dims(**sizes: Any) -> ParallelDims:
    world = prod(sizes.get(name, 1) for name in ("pp", "tp", "cp", "dp_shard", "dp_replicate"))
    return ParallelDims(**{"strategy": "fsdp2", "world_size": world, **sizes})


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"pp": 5}, r"parallelism\.pp: pp 5 > 4 layers: use at most pp 4"),
        ({"pp": 3, "pp_schedule": "interleaved"}, r"pp 3 x 2 of interleaved = 6 stages > 4 layers: use at most pp 2"),
        ({"pp": 4, "pp_schedule": "zero_bubble"}, r"pp 4 x 2 of zero_bubble = 8 stages > 4 layers: use at most pp 2"),
    ],
)
def test_more_stages_than_layers(sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(SizeError, match=said):
        check_pipeline(empty("llama"), dims(**sizes))
    check_pipeline(empty("llama"), dims(pp=4))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        (
            {"pp": 2, "strategy": "ddp"},
            r"strategy: ddp keeps whole models, but pp 2 x dp_replicate 1 x .* = 2: use fsdp2",
        ),
        ({"pp": 2, "strategy": "none"}, r"strategy: none is one process, but pp 2 x .* = 2: use fsdp2"),
        ({"pp": 2, "dp_shard": 2, "world_size": 3}, r"pp 2 x dp_replicate 1 x dp_shard 2 x cp 1 x tp 1 = 4, but"),
        ({"pp": 2, "tp": 2, "sequence_parallel": True}, r"sequence_parallel: does not go with pp 2: turn it off"),
        ({"pp_schedule": "interleaved"}, r"pp_schedule: is interleaved, but pp is 1: set pp"),
        ({"pp": 2, "pp_schedule": "gpipe"}, r"pp_schedule: 'gpipe' is unknown: use 1f1b, interleaved, zero_bubble"),
    ],
)
def test_sizes_that_contradict_each_other(sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(SizeError, match=said):
        dims(**sizes)


@pytest.mark.parametrize(
    ("sizes", "rows", "said"),
    [
        ({"pp": 4}, (8, 4), r"global_batch_size 8 / \(local_batch_size 4 \* dp 1\) = 2 micro-batches < pp 4: lower"),
        ({"pp": 2, "dp_shard": 2}, (8, 4), r"8 / \(local_batch_size 4 \* dp 2\) = 1 micro-batches < pp 2"),
        ({"pp": 2, "pp_schedule": "interleaved"}, (5, 1),
         r"= 5 micro-batches, and 5 % \(5 // pp 2\) = 1, must be 0 .* have 4 or 6 of them"),
    ],
)  # fmt: skip
def test_too_few_micro_batches(sizes: dict[str, Any], rows: tuple[int, int], said: str) -> None:
    with pytest.raises(SizeError, match=said):
        dims(**sizes).grad_accum_steps(*rows)


def test_who_holds_what() -> None:
    eight = dims(pp=2, dp_shard=2, tp=2)
    assert [eight.pp_rank(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [eight.dp_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [eight.seed_rank(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [dims(cp=2, tp=2).seed_rank(rank) for rank in range(4)] == [0, 0, 1, 1]  # other tokens, other dropout
    assert [dims(pp=2).stages_of(rank) for rank in range(2)] == [[0], [1]]
    assert [dims(pp=2, pp_schedule="interleaved").stages_of(rank) for rank in range(2)] == [[0, 2], [1, 3]]
    assert [dims(pp=2, pp_schedule="zero_bubble").stages_of(rank) for rank in range(2)] == [[0, 3], [1, 2]]
    assert [dims(pp=2, pp_schedule="zero_bubble").stage_owner(stage) for stage in range(4)] == [0, 1, 1, 0]
