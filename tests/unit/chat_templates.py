"""Chat templates as models have them: tools, calls, reasoning, in the two notations in use for arguments; and one
conversation encoded by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dayzero.data.chat import ChatEncoder

_HEAD = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}"
)
_FOOT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_TURN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content | trim }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
)
_JSON = '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
_XML = (
    "<function={{ c.function.name }}>{% for k, v in c.function.arguments | items %}\n<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}\n</parameter>{% endfor %}\n</function>"
)
_MARK = "{% if m.role == 'assistant' %}{% generation %}BODY{% endgeneration %}{% else %}BODY{% endif %}"

JSON_CALLS = _HEAD + _TURN.replace("CALL", _JSON) + _FOOT
"""Arguments as a JSON object; no {% generation %}."""
XML_CALLS = _HEAD + _TURN.replace("CALL", _XML) + _FOOT
"""Arguments one by one between tags."""
_BODY = _TURN[_TURN.index("{% if m.reason") : _TURN.index("{% endfor %}<|im_end|>") + len("{% endfor %}")].replace(
    "CALL", _JSON
)
MARKED_CALLS = (
    _HEAD
    + "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    + _MARK.replace("BODY", _BODY)
    + "<|im_end|>\n{% endfor %}"
    + _FOOT
)
"""As JSON_CALLS, with the assistant's words in {% generation %} blocks."""
MARKED_WITHOUT_END = MARKED_CALLS.replace("{% endgeneration %}", "{% endgeneration %}{{ '\n' }}")
"""White space between a {% generation %} block and the end-of-turn token."""
NOT_SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<|x|>"]
"""Tokens of TAGGED, as some tokenizers have them that do not call them special; the last is not in the template."""
TAGGED = (
    "{# <|x|> #}{% for m in messages %}{{ '<|' }}{{ m.role + '|>\n' }}"
    "{{ m.content.split('</think>')[-1] if '</think>' in m.content and not loop.last else m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    "{% if false %}<|user|><think><tool_call></tool_call>{% endif %}"
)
FORGETS_REASONING = JSON_CALLS.replace("m.reasoning_content %}", "m.reasoning_content and loop.last %}")
"""Reasoning of the last turn only, as most reasoning models want it."""


def encode_chat(
    encoder: ChatEncoder, messages: Sequence[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation and, for each, whether it is supervised."""
    ids, mask = encoder.tokenize(encoder.render(messages, tools))
    return ids.tolist(), mask.tolist()
