"""What context parallelism cannot do is refused; rows are split so that every rank has equal causal work."""

from __future__ import annotations

import pytest
import torch
from dayzero.config import Method
from dayzero.engine import context_parallel
from dayzero.engine.context_parallel import check_context_parallel, places_of
from dayzero.engine.model import ModelSource, build_model
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.errors import ConfigError

from tests.tiny import ARCHITECTURES


def empty(name: str):
    source = ModelSource(directory=None, architecture=ARCHITECTURES[name])
    return build_model(source, source.config(), Method(name="full"), seed=0, meta=True)


def test_heads_that_ulysses_cannot_split_are_refused_with_the_equation() -> None:
    with pytest.raises(ConfigError, match=r"ulysses splits num_attention_heads 4 / 3 = 1.333: use a divisor of 4"):
        check_context_parallel(empty("llama"), 3, "ulysses")
    check_context_parallel(empty("llama"), 3, "ring")


def test_a_model_without_replaceable_attention_is_refused() -> None:
    with pytest.raises(ConfigError, match="cp 2: the attention of MambaForCausalLM cannot be replaced"):
        check_context_parallel(empty("mamba"), 2, "ring")


def test_dropout_of_attention_is_refused_where_a_ring_has_none() -> None:
    model = empty("llama")
    model.config.attention_dropout = 0.1
    check_context_parallel(model, 2, "allgather")
    with pytest.raises(ConfigError, match=r"cp_method ring: the model has attention_dropout 0.1, .* use allgather"):
        check_context_parallel(model, 2, "ring")


def test_every_token_goes_to_one_rank_and_all_have_equal_causal_work() -> None:
    places = places_of(32, 4)
    assert torch.cat(places).sort().values.tolist() == list(range(32))
    work = [int((p + 1).sum()) for p in places]  # keys that the tokens of a rank may see
    assert len(set(work)) == 1


def test_groups_of_queries_may_be_attended_to_in_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values are repeated where SDPA would hold all scores."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 8, 4) for heads in (6, 2, 2))
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    found = []
    for takes in (True, False):
        monkeypatch.setattr(context_parallel, "takes_groups_under_a_mask", lambda _, takes=takes: takes)
        found.append(context_parallel._attend(query, key, value, mask, context_parallel._Score(0.5, 0.0, None)))
    torch.testing.assert_close(found[0], found[1])


def test_rows_are_padded_to_what_the_sizes_need() -> None:
    sizes = {"strategy": "fsdp2", "world_size": 4, "cp": 2, "tp": 2}
    assert ParallelDims(**sizes).token_multiple == 4
    assert ParallelDims(**sizes, sequence_parallel=True).token_multiple == 8
    assert ParallelDims(strategy="fsdp2", world_size=4, dp_shard=4).token_multiple == 1
