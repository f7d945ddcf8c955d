"""Turns found by a conversation's shape are those found by rendering each beginning, whatever the template does."""

from __future__ import annotations

from typing import Any

import pytest
from dayzero.config import Tokenize
from dayzero.data import chat_shapes
from dayzero.data.chat import ChatEncoder, Rendered
from dayzero.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from tests.tiny_tokenizer import CHATML

ANY = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}BODY{{ '<|im_end|>\n' }}{% endfor %}"
ANY += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
PUT_IN_PLACE = {
    "plain": CHATML,
    "trimmed": ANY.replace("BODY", "{{ m.content | trim }}"),
    "stripped": ANY.replace("BODY", "{% set c = m['content'].strip() %}{{ c + '' }}"),
    "twice": ANY.replace("BODY", "{{ m.content }}{{ 'and ' + m.content if m.role == 'user' else '' }}"),
    "empty ones told": ANY.replace("BODY", "{{ m.content if m.content else 'nothing' }}"),
    "with tools": "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML,
    "roles told": ANY.replace("BODY", "{{ m.content if m.role in ['user', 'assistant'] else m.content + '!' }}"),
    "system first": "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}" + CHATML,
}
LOOKS = {
    "begins": ANY.replace("BODY", "{{ 'x' if m.content.startswith('The') else m.content }}"),
    "holds": ANY.replace("BODY", "{{ m.content.split('</think>')[-1] if '</think>' in m.content else m.content }}"),
    "length": ANY.replace("BODY", "{{ m.content if m.content | length > 1 else 'short' }}"),
    "equal": ANY.replace("BODY", "{{ 'y' if m.content == 'fox' else m.content }}"),
    "JSON": ANY.replace("BODY", "{{ m.content | tojson }}"),
    "JSON, looked into": ANY.replace("BODY", "{{ m.content }}{{ '!' if 'fox' in (m.content | tojson) }}"),
    "JSON, kept and looked into": ANY.replace(
        "BODY", "{% set c = [m.content] | map('tojson') | list %}{{ m.content }}{{ '!' if 'fox' in c[0] }}"
    ),
    "upper": ANY.replace("BODY", "{{ m.content | upper }}"),
    "characters": ANY.replace("BODY", "{% for c in m.content %}{{ c }}{% endfor %}"),
    "trimmed together": ANY.replace("BODY", "{{ (' x' + m.content) | trim }}"),
    "trimmed, then looked into": ANY.replace("BODY", "{% set c = m.content | trim %}{{ c }}{{ '!' if 'fox' in c }}"),
    "left": ANY.replace("BODY", "{{ m.content.lstrip() }}"),
    "joined, then looked into": ANY.replace("BODY", "{% set c = m.content ~ '' %}{{ c }}{{ '!' if 'fox' in c }}"),
    "macro": "{% macro f(x) %}{{ x }}{% endmacro %}" + ANY.replace("BODY", "{{ f(m.content) }}"),
    "set block": ANY.replace("BODY", "{% set c %}{{ m.content }}{% endset %}{{ c }}{{ '!' if 'fox' in c }}"),
    "found in another": ANY.replace("BODY", "{{ m.content }}{{ '!' if m.content in 'The fox' }}"),
    "found in a variable": ANY.replace(
        "BODY", "{% set c = 'The fox' %}{{ m.content }}{{ '!' if m.content in c or m.content is in c }}"
    ),
    "found by a filter": ANY.replace(
        "BODY", "{{ m.content }}{{ '!' if [m] | selectattr('content', 'in', 'The fox') | list }}"
    ),
    "formatted": ANY.replace("BODY", "{% set c = '%s' % m.content %}{{ c }}{{ '!' if 'fox' in c }}"),
    "formatted by a method": ANY.replace("BODY", "{% set c = '{}'.format(m.content) %}{{ c }}{{ '!' if 'fox' in c }}"),
    "words": ANY.replace("BODY", "{{ m.content }}{{ m.content | wordcount }}"),
    "only at the end": ANY.replace("BODY", "{{ 'x' if loop.last and 'fox' in m.content else m.content }}"),
}
WORDS = st.lists(st.sampled_from(["The", " ", "\n", "fox", "</think>", "☃", '"', "<|im_end|>"]), max_size=4).map(
    "".join
)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), WORDS), min_size=1, max_size=6)


def chat(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def encoder(tokenizer: PreTrainedTokenizerBase, template: str, **options: Any) -> ChatEncoder:
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer, Tokenize(**options))


def rendered(encoder: ChatEncoder, messages: list[dict[str, Any]]) -> Rendered | str:
    try:
        return encoder.render(messages)
    except ConfigError as error:
        return str(error)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    turns=TURNS, before=TURNS, name=st.sampled_from([*PUT_IN_PLACE, *LOOKS]), last=st.booleans(), special=st.booleans()
)
def test_shapes_change_nothing(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[tuple[str, str]],
    before: list[tuple[str, str]],
    name: str,
    last: bool,
    special: bool,
) -> None:
    template = {**PUT_IN_PLACE, **LOOKS}[name]
    options = {"loss_turns": "last" if last else "all", "special_text": "special" if special else "auto"}
    one, other = (encoder(tokenizer, template, **options) for _ in "ab")
    other._turns._shapes._places = 0
    for conversation in (before, turns, turns):
        assert rendered(one, chat(conversation)) == rendered(other, chat(conversation))


@pytest.mark.parametrize("name", PUT_IN_PLACE)
def test_a_template_that_puts_texts_in_place_is_rendered_once(
    tokenizer: PreTrainedTokenizerBase, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = encoder(tokenizer, PUT_IN_PLACE[name])
    turns = [("system", "Be brief."), *[("user", " What? \n"), ("assistant", "The fox. "), ("assistant", "")] * 4]
    first = made.render(chat(turns))
    calls = []
    render = made._template.render
    monkeypatch.setattr(made._template, "render", lambda *a, **k: calls.append(a) or render(*a, **k))
    assert made.render(chat(turns)) == first
    assert made.render(chat([(role, text.replace("fox", "dogs")) for role, text in turns])) != first
    assert len(calls) == 2


@pytest.mark.parametrize("name", LOOKS)
def test_a_template_that_looks_into_texts_has_no_shapes(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    made = encoder(tokenizer, LOOKS[name])
    made.render(chat([("user", "Hi"), ("assistant", "The dog")]))
    assert not any(made._turns._shapes._known.values())


def test_what_is_seen_only_in_a_beginning_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """The whole conversation is as its shape says; the beginning that ends with the first answer is not."""
    made = encoder(tokenizer, LOOKS["only at the end"])
    turns = [("user", "Hi"), ("assistant", "The dog"), ("user", "Hi"), ("assistant", "The dog")]
    made.render(chat(turns))
    with pytest.raises(ConfigError, match="changes a conversation as it goes on around message 2"):
        made.render(chat([*turns[:1], ("assistant", "The fox"), *turns[2:]]))


def test_few_shapes_are_remembered(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_shapes, "SHAPES", 3)
    made = encoder(tokenizer, CHATML)
    for n in range(1, 6):
        turns = [("user", "Hi"), ("assistant", "The dog")] * n
        assert made.render(chat(turns)).pieces()[1::2] == ["The dog<|im_end|>"] * n
    assert len(made._turns._shapes._known) == 3
