"""Which tokens of a conversation are supervised under each `tokenize.loss_*`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dayzero.config import Tokenize
from dayzero.data.chat import ChatEncoder
from dayzero.data.documents import DocumentEncoder
from dayzero.errors import ConfigError, DataError
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.tiny_tokenizer import CHATML
from tests.unit.chat_templates import (
    FORGETS_REASONING,
    JSON_CALLS,
    MARKED_CALLS,
    MARKED_WITHOUT_END,
    XML_CALLS,
    encode_chat,
)
from tests.unit.test_chat_masks import supervised

MARKED = CHATML.replace(
    "m['content'] + '<|im_end|>' + '\n' }}",
    "'' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}",
)


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 17 + 25?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "A sum. ☃",
        "tool_calls": [_call("add", {"a": 17, "to": "25 🤖"}), _call("add", {})],
    },
    {"role": "tool", "content": "42", "name": "add"},
    {"role": "assistant", "content": "The answer is 42.", "reasoning_content": "The tool said 42."},
]
CALLS = (
    '<tool_call>\n{"name": "add", "arguments": {"a": 17, "to": "25 🤖"}}\n</tool_call>'
    '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
)


def runs(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: list[dict[str, Any]] = CHAT,
    tools: Any = TOOLS,
    **options: Any,
) -> list[str]:
    """The supervised texts; the ids must be those of the rendered conversation."""
    tokenizer.chat_template = template
    ids, mask = encode_chat(ChatEncoder(tokenizer, Tokenize(**options)), messages, tools)
    assert tokenizer.decode(ids).rstrip() == tokenizer.apply_chat_template(messages, tools, tokenize=False).rstrip()
    return supervised(tokenizer, ids, mask)


THOUGHT, LAST_THOUGHT = "<think>\nA sum. ☃\n</think>\n\n", "<think>\nThe tool said 42.\n</think>\n\n"
BOTH = [THOUGHT + CALLS + "<|im_end|>", LAST_THOUGHT + "The answer is 42.<|im_end|>"]


@pytest.mark.parametrize("template", [JSON_CALLS, MARKED_CALLS], ids=["prefixes", "marked"])
def test_turns_and_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    assert runs(tokenizer, template) == BOTH
    assert runs(tokenizer, template, loss_turns="last") == BOTH[1:]
    assert runs(tokenizer, template, loss_reasoning=False) == [CALLS + "<|im_end|>", "The answer is 42.<|im_end|>"]
    assert runs(tokenizer, template, loss_turns="last", loss_reasoning=False) == ["The answer is 42.<|im_end|>"]
    found = runs(tokenizer, template, loss_parts="tool_arguments")
    assert [arguments.strip() for arguments in found] == ['{"a": 17, "to": "25 🤖"}', "{}"]
    assert runs(tokenizer, template, loss_parts="tool_arguments", loss_turns="last") == []
    assert runs(tokenizer, template, loss_roles=["user", "tool"]) == ["What is 17 + 25?<|im_end|>", "42<|im_end|>"]
    assert runs(tokenizer, template, loss_roles=["user", "assistant"])[0] == "What is 17 + 25?<|im_end|>"
    assert runs(tokenizer, template, loss_roles=["user", "assistant"], loss_turns="last") == BOTH[1:]


@pytest.mark.parametrize("words", ["user", "e", "s", "start", "im_end", "<|im_end|>", "assistant\n", " t ", "\n", ""])
@pytest.mark.parametrize("template", [CHATML, JSON_CALLS, MARKED_CALLS], ids=["plain", "prefixes", "marked"])
def test_anyones_words_are_found_where_they_are_said(
    tokenizer: PreTrainedTokenizerBase, template: str, words: str
) -> None:
    """Not where the head of their turn holds the same words."""
    for role in ("user", "system", "tool"):
        messages = [{"role": role, "content": words}, {"role": "assistant", "content": "hello"}]
        found = runs(tokenizer, template, messages, None, loss_roles=[role, "assistant"])
        assert found == [*([words + "<|im_end|>"] if words.strip() else []), "hello<|im_end|>"]


def test_the_first_turn_needs_no_empty_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    template = "{% if messages[0].role == 'system' %}{% endif %}" + CHATML.replace(
        "m['content']", "m['content'] | trim"
    )
    messages = [{"role": "user", "content": " user "}, {"role": "assistant", "content": "hello"}]
    assert runs(tokenizer, template, messages, None, loss_roles=["user"]) == ["user<|im_end|>"]
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | upper")
    with pytest.raises(ConfigError, match="rewrites the content of message 1, of the role user"):
        encode_chat(ChatEncoder(tokenizer, Tokenize(loss_roles=["user"])), messages)


def test_a_cut_tears_no_control_token_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    """Here the turn's head and what is said make one together."""
    tokenizer.chat_template = "{% for m in messages %}{{ '<' + m.content + '\n' }}<|im_end|>\n{% endfor %}"
    encoder = ChatEncoder(tokenizer, Tokenize(loss_roles=["user"]))
    ids, mask = encode_chat(encoder, [{"role": "user", "content": "|im_start|>Hi"}])
    assert tokenizer.decode(ids) == "<|im_start|>Hi\n<|im_end|>\n"
    assert supervised(tokenizer, ids, mask) == ["Hi\n<|im_end|>"]
    assert mask[0] is False


def test_an_end_of_turn_after_white_space_is_supervised(tokenizer: PreTrainedTokenizerBase) -> None:
    assert runs(tokenizer, MARKED_WITHOUT_END) == [answer.replace("<|im_end|>", "\n<|im_end|>") for answer in BOTH]
    assert runs(tokenizer, MARKED_WITHOUT_END, loss_turns="last") == [BOTH[1].replace("<|im_end|>", "\n<|im_end|>")]
    found = runs(tokenizer, MARKED_WITHOUT_END, loss_roles=["user", "tool"])
    assert found == ["What is 17 + 25?<|im_end|>", "42<|im_end|>"]


def test_the_next_turns_head_is_no_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": role, "content": "hello"} for role in ("user", "assistant", "user", "assistant")]
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    ids, mask = encode_chat(ChatEncoder(tokenizer, Tokenize()), messages)
    assert supervised(tokenizer, ids, mask) == ["hello", "hello" + tokenizer.eos_token]


@pytest.mark.parametrize(
    "template",
    [
        MARKED.replace("== 'assistant'", "== 'user'"),
        MARKED.replace("== 'assistant'", "== 'nobody'"),
        MARKED.replace("{{ m['content'] }}{% endgeneration %}", "{% endgeneration %}{{ m['content'] }}"),
    ],
    ids=["another role's", "never written", "empty"],
)
def test_markers_about_no_answer_are_refused(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "hello"}]
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=r"generation %\} blocks but none about what the assistant says"):
        encode_chat(ChatEncoder(tokenizer, Tokenize()), messages)
    assert not any(encode_chat(ChatEncoder(tokenizer, Tokenize()), messages[:1])[1])


def test_arguments_between_tags(tokenizer: PreTrainedTokenizerBase) -> None:
    found = "".join(runs(tokenizer, XML_CALLS, loss_parts="tool_arguments"))
    assert found == "a>\n17\n</parameter><parameter=to>\n25 🤖"


def test_a_call_without_arguments(tokenizer: PreTrainedTokenizerBase) -> None:
    """A model must learn to give none too, where the template writes anything for that."""
    call = {"role": "assistant", "content": "{}", "tool_calls": [_call("now", {})]}
    messages = [{"role": "user", "content": "{} {}"}, call]
    assert [run.strip() for run in runs(tokenizer, JSON_CALLS, messages, loss_parts="tool_arguments")] == ["{}"]
    assert runs(tokenizer, XML_CALLS, messages, loss_parts="tool_arguments") == []


def test_a_part_is_told_by_its_place_not_by_its_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """The same words stand elsewhere too."""
    again = '{"a": 1}'
    messages = [
        {"role": "user", "content": again},
        {"role": "assistant", "content": again, "reasoning_content": again, "tool_calls": [_call("add", {"a": 1})]},
    ]
    found = runs(tokenizer, JSON_CALLS, messages, loss_parts="tool_arguments")
    assert "".join(found).strip() == again
    tokenizer.chat_template = JSON_CALLS
    ids, mask = encode_chat(ChatEncoder(tokenizer, Tokenize(loss_parts="tool_arguments")), messages, TOOLS)
    assert tokenizer.decode(ids[: mask.index(True)]).rstrip().endswith('"arguments":')
    assert runs(tokenizer, JSON_CALLS, messages, loss_reasoning=False)[0].startswith(again + "<tool_call>")


def test_reasoning_inside_the_content(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nlong </x> thought\n</think>\n\nHello."},
    ]
    assert runs(tokenizer, CHATML, messages, None, loss_reasoning=False) == ["Hello.<|im_end|>"]
    assert runs(tokenizer, CHATML, messages, None) == [messages[1]["content"] + "<|im_end|>"]


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ("secret</think>answer", ["answer<|im_end|>"]),
        ("\nsecret\n</think>\n\nanswer", ["answer<|im_end|>"]),
        ("<think>secret", ["<|im_end|>"]),
        ("<think>\nsecret\n", ["<|im_end|>"]),
        ("Well.<think>secret", ["Well.", "<|im_end|>"]),
        ("<think>secret</think>An<think>more secret</think>\nswer", ["An", "swer<|im_end|>"]),
        ("<think>secret</think>secret</think>answer", ["answer<|im_end|>"]),
        ("<thinking>secret <think></thinking>answer", ["answer<|im_end|>"]),
        ("<think></think>answer", ["answer<|im_end|>"]),
        ("<think>\n\n</think>\n\nanswer", ["answer<|im_end|>"]),
        ("An<think></think>swer<think>", ["An", "swer", "<|im_end|>"]),
        ("</think>answer", ["answer<|im_end|>"]),
    ],
)
def test_reasoning_is_masked_however_the_content_holds_it(
    tokenizer: PreTrainedTokenizerBase, content: str, left: list[str]
) -> None:
    messages = [{"role": "user", "content": "secret</think>"}, {"role": "assistant", "content": content}]
    for template in (CHATML, MARKED, JSON_CALLS):
        assert runs(tokenizer, template, messages, None, loss_reasoning=False) == left
        assert runs(tokenizer, template, messages, None) == [content + "<|im_end|>"]


def test_a_token_that_holds_a_character_of_masked_reasoning(tokenizer_path: Path) -> None:
    """To learn it would be to learn to begin a tag; white space about the block is none of it."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    tokenizer.add_tokens([AddedToken(joined, normalized=False) for joined in ("e<", " answer")])
    content = "The<think>secret</think> answer"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    assert runs(tokenizer, CHATML, messages, None, loss_reasoning=False) == ["Th", " answer<|im_end|>"]
    assert runs(tokenizer, CHATML, messages, None) == [content + "<|im_end|>"]


def test_an_empty_block_that_the_template_drops_loses_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>\n</think>answer"}]
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    encoder = ChatEncoder(tokenizer, Tokenize(loss_reasoning=False))
    assert supervised(tokenizer, *encode_chat(encoder, messages)) == ["answer<|im_end|>"]
    assert not encoder.counts["reasoning_left_out"]


def test_an_empty_block_that_the_template_writes_is_masked(tokenizer: PreTrainedTokenizerBase) -> None:
    """Beside answers with reasoning the model would learn just not to think."""
    always = JSON_CALLS.replace("{% if m.reasoning_content %}", "{% if m.role == 'assistant' %}")
    opened = always.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    chat = [*messages, messages[0], {**messages[1], "reasoning_content": "A greeting."}]
    chat += [messages[0], {"role": "assistant", "content": "", "tool_calls": [_call("add", {})]}]
    called = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>'
    for template in (always, opened):
        assert runs(tokenizer, template, chat, loss_reasoning=False) == ["Hello.<|im_end|>"] * 2 + [called]
        assert runs(tokenizer, template, messages, None, loss_reasoning=False) == ["Hello.<|im_end|>"]
    assert runs(tokenizer, always, messages, None) == ["<think>\n\n</think>\n\nHello.<|im_end|>"]


def test_reasoning_of_both_kinds_in_one_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = {"role": "assistant", "content": "<think>b</think>An<think>c</think>swer", "reasoning_content": "a"}
    found = runs(tokenizer, JSON_CALLS, [{"role": "user", "content": "Hi"}, answer], None, loss_reasoning=False)
    assert found == ["An", "swer<|im_end|>"]


def test_reasoning_that_cannot_be_told_from_the_rest_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    counted = "{{ m.reasoning_content | trim }} ({{ m.reasoning_content | length }})"
    tokenizer.chat_template = JSON_CALLS.replace("{{ m.reasoning_content | trim }}", counted)
    with pytest.raises(ConfigError, match=r"reasoning of message 3 where .* set tokenize\.loss_reasoning: true"):
        encode_chat(ChatEncoder(tokenizer, Tokenize(loss_reasoning=False)), CHAT, TOOLS)
    encoder = ChatEncoder(tokenizer, Tokenize())
    encode_chat(encoder, CHAT, TOOLS)
    assert not encoder.counts["reasoning_left_out"]


SYSTEM_FIRST = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
"""A system prompt of the template's own, as Qwen2.5's and SmolLM2's have one; it looks at the first message."""


@pytest.mark.parametrize("template", [CHATML, JSON_CALLS, MARKED, MARKED_CALLS], ids=["plain", "json", "marked", "all"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
def test_an_answer_may_open_the_conversation(
    tokenizer: PreTrainedTokenizerBase, template: str, tools: list[dict[str, Any]] | None
) -> None:
    """Before it stands what the template writes of its own, which is not supervised."""
    if tools and template in (CHATML, MARKED):
        template = JSON_CALLS[: JSON_CALLS.index("{% for m")] + template
    messages = [{"role": r, "content": f"I am {r}."} for r in ("assistant", "user", "assistant")]
    loop, own_text = "{% for m in messages %}", "{% if loop.first and m.role != 'system' %}[no system]{% endif %}"
    first_of_all = template.replace(loop, loop + own_text)
    said = ["I am assistant.<|im_end|>"] * 2
    for own in (template, SYSTEM_FIRST + template, first_of_all):
        assert runs(tokenizer, own, messages, tools) == said
        assert runs(tokenizer, own, messages, tools, loss_turns="last") == said[1:]
        assert runs(tokenizer, own, messages[:1], tools, loss_turns="last") == said[1:]


def test_an_opening_answer_with_parts(tokenizer: PreTrainedTokenizerBase) -> None:
    always = SYSTEM_FIRST + JSON_CALLS.replace("{% if m.reasoning_content %}", "{% if m.role == 'assistant' %}")
    answer = {"role": "assistant", "content": "", "reasoning_content": "A sum. ☃", "tool_calls": CHAT[2]["tool_calls"]}
    chat = [answer, {"role": "user", "content": "Hi"}]
    for template in (always, SYSTEM_FIRST + JSON_CALLS):
        assert runs(tokenizer, template, chat) == BOTH[:1]
        assert runs(tokenizer, template, chat, loss_reasoning=False) == [CALLS + "<|im_end|>"]


def test_the_way_out_of_an_unstable_template_is_one_that_is_left(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = MARKED.replace("{{ '<|im_end|>", "{% if loop.last %}(end){% endif %}{{ '<|im_end|>")
    messages = [{"role": r, "content": f"I am {r}."} for r in ("user", "assistant")]
    with pytest.raises(ConfigError, match=r"in its beginning: leave user out of tokenize\.loss_roles$"):
        encode_chat(ChatEncoder(tokenizer, Tokenize(loss_roles=["user", "assistant"])), messages)


def test_reasoning_that_the_template_forgets_is_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = FORGETS_REASONING
    encoder = ChatEncoder(tokenizer, Tokenize(loss_turns="last"))
    ids, mask = encode_chat(encoder, CHAT, TOOLS)
    assert supervised(tokenizer, ids, mask) == BOTH[1:]
    assert encoder.counts["reasoning_left_out"] == 1
    with pytest.raises(ConfigError, match=r"token \d+ is .* or supervise only the last turn"):
        encode_chat(ChatEncoder(tokenizer, Tokenize()), CHAT, TOOLS)


def test_tools_that_the_template_does_not_write_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML
    with pytest.raises(ConfigError, match="does not write tools, which the data has"):
        encode_chat(ChatEncoder(tokenizer, Tokenize()), CHAT, TOOLS)
    with pytest.raises(ConfigError, match="does not write tool_calls"):
        encode_chat(ChatEncoder(tokenizer, Tokenize()), CHAT)
    fixed = JSON_CALLS.replace("{{ c.function.arguments | tojson }}", "{}")
    tokenizer.chat_template = fixed
    with pytest.raises(ConfigError, match="does not write the arguments of tool_calls, which the data has"):
        encode_chat(ChatEncoder(tokenizer, Tokenize()), CHAT, TOOLS)


@pytest.mark.parametrize("role", ["system", "tool"])
def test_a_role_that_the_template_does_not_write_is_refused(tokenizer: PreTrainedTokenizerBase, role: str) -> None:
    tokenizer.chat_template = JSON_CALLS.replace("{% for m in messages %}", "{% for m in messages if m.role != ROLE %}")
    tokenizer.chat_template = tokenizer.chat_template.replace("ROLE", repr(role))
    messages = [{"role": r, "content": f"I am {r}."} for r in ("system", "user", "assistant", "tool", "assistant")]
    with pytest.raises(ConfigError, match=f"does not write the texts of the role {role}, which the data has"):
        encode_chat(ChatEncoder(tokenizer, Tokenize()), messages)


def test_reasoning_that_the_prompt_opens_and_the_content_too(tokenizer: PreTrainedTokenizerBase) -> None:
    template = JSON_CALLS.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    messages = [
        {"role": "user", "content": "What is 17 + 25?"},
        {"role": "assistant", "content": "<think>\nA sum.\n</think>\n\nIt is 42."},
    ]
    assert runs(tokenizer, template, messages, None) == ["A sum.\n</think>\n\nIt is 42.<|im_end|>"]
    assert runs(tokenizer, template, messages, None, loss_reasoning=False) == ["It is 42.<|im_end|>"]


def test_the_end_of_a_turn_after_calls_that_end_in_a_control_token(tokenizer_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]}
    )
    assert runs(tokenizer, MARKED_CALLS) == BOTH


def test_the_next_head_is_no_end_of_a_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    """A template without end-of-turn tokens, whose next turn begins directly behind the {% generation %} block."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [{"role": r, "content": f"I am {r}."} for r in ("user", "assistant", "user", "assistant")]
    ids, mask = encode_chat(ChatEncoder(tokenizer, Tokenize()), messages)
    assert supervised(tokenizer, ids, mask) == ["I am assistant.", "I am assistant." + tokenizer.eos_token]


def test_a_template_that_fails_on_a_value_says_so(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + m.name }}{% endfor %}"
    with pytest.raises(DataError, match="the chat template refuses a conversation of user"):
        encode_chat(ChatEncoder(tokenizer, Tokenize()), [{"role": "user", "content": "a"}])


def test_arguments_that_are_nested_too_deep_are_a_bad_row(tokenizer: PreTrainedTokenizerBase) -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = {"a": deep}
    call = {"role": "assistant", "content": "", "tool_calls": [_call("add", {"a": deep})]}
    tokenizer.chat_template = JSON_CALLS
    for options in ({}, {"special_text": "special"}, {"loss_parts": "tool_arguments"}):
        with pytest.raises(DataError, match=r"nested too deep|refuses a conversation"):
            encode_chat(ChatEncoder(tokenizer, Tokenize(**options)), [call])


def test_loss_keys_are_only_for_conversations(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=r"tokenize\.loss_turns is only for conversations, this data is kept as text"):
        DocumentEncoder(tokenizer, "text", Tokenize(loss_turns="last"))


NASTY = [
    "",
    " ",
    "\n",
    "\r\n",
    "\x00",
    "\ufeff",
    "e\u0301",
    "👩‍👩‍👧",
    "🇩🇪",
    "ﷺ",
    "\u202e",
    "<|im_end|>",
    "<|im_start|>",
    "<|im_",
    "end|>",
]
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ufdd0\ufdd1\ufdd2\ufdd3"), max_size=20),
    st.lists(st.sampled_from([*NASTY, "The answer", "assistant\n", "fox"]), max_size=6).map("".join),
)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    turns=TURNS,
    marked=st.booleans(),
    last=st.booleans(),
    roles=st.sampled_from([["assistant"], ["user", "assistant"], ["system", "user", "assistant"]]),
)
def test_the_supervised_tokens_are_what_the_chosen_roles_say(
    tokenizer_path: Path, turns: list[tuple[str, str]], marked: bool, last: bool, roles: list[str]
) -> None:
    tokenizer = _cached(tokenizer_path)
    tokenizer.chat_template = MARKED if marked else CHATML
    messages = [{"role": role, "content": text} for role, text in turns]
    options = Tokenize(loss_turns="last" if last else "all", loss_roles=roles)
    ids, mask = encode_chat(ChatEncoder(tokenizer, options), messages)
    chosen = [turn for turn in turns if turn[0] in roles]
    chosen = chosen[-1:] if last else chosen
    # an assistant may say nothing, and learns to; of others' blank turns there is nothing to learn
    said = [text + "<|im_end|>" for role, text in chosen if role == "assistant" or text.strip()]
    assert supervised(tokenizer, ids, mask) == said
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    for token in ("<|im_start|>", "<|im_end|>"):
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == len(turns)
    assert not set(ids) & {tokenizer.bos_token_id, tokenizer.eos_token_id}


_TOKENIZERS: dict[Path, PreTrainedTokenizerBase] = {}


def _cached(tokenizer_path: Path) -> PreTrainedTokenizerBase:
    if tokenizer_path not in _TOKENIZERS:
        _TOKENIZERS[tokenizer_path] = AutoTokenizer.from_pretrained(tokenizer_path)
    return _TOKENIZERS[tokenizer_path]
