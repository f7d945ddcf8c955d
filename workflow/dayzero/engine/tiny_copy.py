"""A tiny copy of any architecture, with random weights: what can be asked of it need not be asked of the real model.

Its config is the model's own, shrunk by rules on the names of its fields: no rule names an architecture. A field that
no rule knows keeps its value, so what an architecture is made of (its kinds of layers, gates, caps, scales, tied
weights) stays; sizes go down, and windows, chunks and what is chosen among tokens become so short that a few dozen
tokens reach past them.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 128
WIDTH = 64

SIZES: list[tuple[str, int]] = [
    # what counts layers in a pattern
    (r"period|interval|every_n|sparse_step|(^|_)pattern$", 2),
    (r"offset|start_index|first_k_dense|num_dense_layers|max_window_layers|kv_shared_layers|mtp|nextn|cycles|pool", 1),
    (r"layers_per_stack|^num_mem_blocks$", 2),
    # experts
    (r"shared_experts?$|zero_expert|n_group$|topk_group|expert_group", 1),
    (r"experts_per_tok|moe_k$|moe_topk|top_k|index_topk$", 2),
    (r"(^|_)n?u?m?_?experts$", 4),
    # vocabulary, lengths, windows
    (r"vocab", VOCAB_SIZE),
    (r"positions?(_embeddings)?$|max_seq_len|n_ctx|context_length|model_max_length|rel_extent|floor_scale", 256),
    (r"window|local_attention$|attention_chunk|chunk_?size|block_size|buckets|max_distance", 8),
    (r"index_topk_blocks|compress|num_conv|number_of|split_ngram|divisible|heads_per_ngram", 4),
    # heads
    (r"attention_head_dim$|^qk_head_dim$", 32),
    (r"head_?dim$|d_head$|dim_head$|kv_channels|rotary_dim|state|query_pre_attn", 16),
    (r"mamba_(n_|num_)heads$|^n_mamba_heads$", 8),
    (r"(key_value|kv|key)_heads$|^num_query_groups$", 2),
    (r"heads?$|heads_per_layer$", 4),
    (r"n_?groups$|o_groups", 1),
    # ranks
    (r"rank", 8),
    # widths
    (r"multiple_of", 8),
    (r"ple_embed_dim", WIDTH),
    (r"d_ssm", 2 * WIDTH),
    (r"intermediate|ffn|inner|dff|dim_ff|mlp", 96),
    (r"hidden_size|n_embd|d_model|embed_proj_dim|embedding_dim|lru_width|d_rel|dim_model_base|width", WIDTH),
    (r"prompt_length", 4),
]
"""Field names (searched, the first that matches wins) -> its largest value. Smaller defaults are kept."""

MISSING: list[tuple[str, Any]] = [
    (r"^head_dim$", 16),
    (r"^num_key_value_heads$", 2),
    (r"experts$", 4),
    (r"experts_per_tok$", 2),
    (r"^(n_group|topk_group|indexer_kv_heads)$", 1),
    (r"^indexer_(n_heads|compress_ratio)$", 4),
    (r"^indexer_head_dim$", 16),
    (r"^indexer_budget$", 8),
    (r"^logit_scale$", 0.5),
    (r"^clip_qkv$", 8.0),
    (r"^layer_types$", ["conv", "full_attention"]),
]
"""Values for fields that a model needs and its config's defaults leave out; taken only where nothing else builds."""

DEPTH = r"^(num_(hidden_)?layers|n_layers?|decoder_layers|num_blocks)$"
KEPT = r"inference|multiplier|factor|coef|eps|theta|limit|sinkhorn|_token_id|^seed$|kernel|conv|d_conv|expand|expansion"

LAYER_NUMBERS = r"(_ids|_idxs|_indices|only_layers|moe_layers)$"
"""Lists of the numbers of layers."""


def tiny_copy(model: PreTrainedModel) -> PreTrainedModel | None:
    """A tiny model of the class of `model`, in float32 on the CPU, in eval mode; None where no tiny config works.

    Its weights are random, and always the same ones.
    """
    key = type(model), model.config.to_json_string(use_diff=False)
    if key not in _MADE:
        _MADE.clear()  # one model is asked several things
        _MADE[key] = _make(model)
    return copy.deepcopy(_MADE[key])


_MADE: dict[tuple[type, str], PreTrainedModel | None] = {}


def _make(model: PreTrainedModel) -> PreTrainedModel | None:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        for config in tiny_configs(model.config):
            torch.manual_seed(0)
            try:
                small = type(model)._from_config(config, dtype=torch.float32).eval()
                for parameter in small.parameters():  # what starts at zero or one would hide much
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
                if small(input_ids=TOKENS, use_cache=False).logits.isfinite().all():
                    return small
            except Exception:  # noqa: S112  # each architecture has its own way to refuse a size
                continue
    return None


TOKENS = torch.arange(3, 32).unsqueeze(0)
"""[1, T]: a row of tokens that a tiny model knows."""


@torch.no_grad()
def mixes_dtypes(model: PreTrainedModel) -> bool:
    """Whether `model` cannot compute with bfloat16 parameters beside its float32 buffers."""
    small = tiny_copy(model)
    if small is None:
        return False
    for parameter in small.parameters():
        parameter.data = parameter.data.bfloat16()
    try:
        small(input_ids=TOKENS, use_cache=False)
    except RuntimeError:
        return True
    return False


def tiny_configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Tiny configs to try in turn: the first that builds and computes is the tiny model's."""
    for fields in tiny_fields(config.to_dict()):
        try:
            tiny = type(config)(**fields)
        except Exception:  # noqa: S112  # each config class has its own checks, with their own errors
            continue
        tiny.use_cache = False
        yield tiny


def tiny_fields(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The same as fields of a config, not all of which its class will take."""
    for fill in (False, True):
        for repeats in (1, 2):
            tiny = _shrink(fields, *_layers_to_keep(fields, repeats))
            if fill:
                tiny |= _missing(tiny)
            if tiny.get("mamba_d_ssm"):
                tiny["mamba_d_ssm"] = tiny["mamba_n_heads"] * tiny["mamba_d_head"]
            heads = next((v for k, v in tiny.items() if re.search(r"^(num_attention|n|num)_heads?$", k)), None)
            yield tiny
            equal = {k: heads for k, v in tiny.items() if re.search(r"(key_value|kv)_heads$", k) and v is not None}
            yield {**tiny, **equal}
            if heads and "expand" in tiny and "head_dim" in tiny:
                yield {**tiny, "head_dim": tiny["expand"] * WIDTH // heads}


def _missing(tiny: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tiny.items():
        if value is None:
            found.update((name, filled) for pattern, filled in MISSING if re.search(pattern, name))
    if not tiny.get("rope_parameters", True):
        kinds = set(found.get("layer_types") or tiny.get("layer_types") or ())
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}  # of head_dim 16
        found["rope_parameters"] = {kind: rope for kind in sorted(kinds)}
    if "attn_config" in tiny:
        part = tiny["attn_config"]
        found["attn_config"] = {**part, **_missing(part), "rope_theta": 10000.0}
    return found


def _layers_to_keep(fields: dict[str, Any], repeats: int) -> tuple[int, list[int]]:
    """(depth, layers to keep): as many as it takes to have every kind of layer, `repeats` times, and two at least."""
    depth = max([v for k, v in fields.items() if re.search(DEPTH, k) and isinstance(v, int)], default=0)
    kinds = [v for k, v in fields.items() if isinstance(v, list) and len(v) == depth and not _numbers(k)]
    kept: list[int] = []
    for values in kinds:
        named = list(map(repr, values))
        kept += [named.index(kind) for kind in dict.fromkeys(named)]
    kept = sorted(set(kept)) or [0]
    kept = kept * max(repeats, -(-2 // len(kept)))
    return depth, kept


def _numbers(name: str) -> bool:
    return re.search(LAYER_NUMBERS, name) is not None


def _shrink(fields: dict[str, Any], depth: int, kept: list[int], *, top: bool = True) -> dict[str, Any]:
    dropped: tuple[str, ...] = (
        "transformers_version",
        "architectures",
        "id2label",
        "label2id",
        "dtype",
        "problem_type",
    )
    if "model_type" in fields and not top:  # a config within the config
        dropped = (*dropped, *PretrainedConfig().to_dict())
    return {k: _value(k, v, depth, kept) for k, v in fields.items() if k not in dropped}


def _value(name: str, value: Any, depth: int, kept: list[int]) -> Any:
    if name == "is_decoder":
        return True  # an encoder that was made a decoder attends to what comes before only when told so
    if isinstance(value, dict):
        if value and all(str(key).isdigit() for key in value):  # by number of the layer
            return {str(at): _shrink(value[key], depth, kept) for at, key in _layers_of(value, kept)}
        return _shrink(value, depth, kept, top=False)
    if isinstance(value, list):
        if _numbers(name):
            return [at for at, layer in enumerate(kept) if layer in value] or [len(kept) - 1] if value else value
        if depth and len(value) == depth:
            return [_value(name, value[layer], depth, kept) for layer in kept]
        if value and all(isinstance(part, list) for part in value):  # [[kinds, times]]
            return [[part[0], len(kept) // len(part[0]) or 1] for part in value]
        return value
    if isinstance(value, float) and re.search(r"drop|jitter", name):
        return 0.0  # two ways to compute the same are to be compared
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name.endswith("_token_id"):
        return {"bos_token_id": 1, "eos_token_id": 2}.get(name, 0) if value >= VOCAB_SIZE else value
    if re.search(DEPTH, name):
        return len(kept)
    if name.endswith("end_index"):
        return len(kept) - 1
    if re.search(KEPT, name):
        return value
    for pattern, largest in SIZES:
        if re.search(pattern, name):
            times = 2 if largest == WIDTH and "attention_hidden" in name else 1
            return min(value, largest * times)
    return value


def _layers_of(value: dict[str, Any], kept: list[int]) -> list[tuple[int, str]]:
    """(new number, key) of the kept layers that `value`, which is by number of the layer, says something about."""
    keys = {int(key): key for key in value}
    return [(at, keys[layer]) for at, layer in enumerate(kept) if layer in keys]
