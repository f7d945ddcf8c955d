"""Patterns name what is not trained."""

from __future__ import annotations

import pytest
from dayzero.config import Method
from dayzero.engine.freeze import frozen_names
from dayzero.engine.model import ModelSource, build_model
from dayzero.errors import ConfigError
from torch import nn

from tests.tiny import ARCHITECTURES


def build(name: str, method: Method) -> nn.Module:
    source = ModelSource(directory=None, architecture=ARCHITECTURES[name], random_weights=True)
    return build_model(source, source.config(), method, seed=0, meta=True)


def test_only_what_is_named_is_frozen() -> None:
    model = build("qwen3", Method(name="full", freeze=["model.embed_tokens.*", "*.layers.[01].*norm.*"]))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        n for n, _ in model.named_parameters() if "embed" in n or ("norm" in n and n[13:15] in ("0.", "1."))
    }
    assert len(frozen) == 1 + 2 * 4


def test_a_tied_weight_is_frozen_by_either_name() -> None:
    model = build("llama", Method(name="full", freeze=["lm_head.*"]))
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"model.embed_tokens.weight"}
    assert frozen_names(model, ["lm_head.*"]) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Method(name="full", freeze=["embed"]), r"'embed' matches no trained parameter.*model\.embed_tokens\.weight"),
        (Method(name="full", freeze=["*"]), "freezes all .* trained parameters: leave some"),
    ],
)
def test_patterns_that_name_nothing_or_all(method: Method, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        build("llama", method)
    assert "\n" not in str(refused.value)
