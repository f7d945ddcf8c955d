"""Where a part of a message, its reasoning or the arguments of a tool call, stands in the rendered conversation.

A chat template may write a part in any way, so it is not looked for by its text: the conversation is rendered again
with a stand-in for the part, and the two renderings must be equal on both sides of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from dayzero.data.plain_text import STAND_IN, Range
from dayzero.errors import ConfigError

Render = Callable[[list[dict[str, Any]]], str | None]
"""Renders messages; None where the template refuses them."""

_THINK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)


def reasoning(messages: list[dict[str, Any]], text: str, render: Render) -> tuple[list[Range], int]:
    """The ranges of `text` that are assistants' reasoning, and how many reasonings the template leaves out.

    Reasoning is `reasoning_content`, or a `<think>` block at the beginning of the content.
    """
    ranges, left_out = [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        changed = dict(message)
        if message.get("reasoning_content", "").strip():
            changed["reasoning_content"] = STAND_IN
        elif (match := _THINK.match(message["content"])) and match[1].strip():
            changed["content"] = message["content"][: match.start(1)] + STAND_IN + message["content"][match.end(1) :]
        else:
            continue
        found = _compare(text, render([*messages[:i], changed, *messages[i + 1 :]]))
        if found:
            ranges.append(found)
        else:
            left_out += 1
    return ranges, left_out


def tool_arguments(messages: list[dict[str, Any]], text: str, render: Render) -> list[Range]:
    """The ranges of `text` that are the arguments of tool calls: the JSON object, or all that a template of another
    notation writes from the first argument's name to the last one's value.

    Raises ConfigError where the template does not write them once each.
    """
    ranges = []
    for i, message in enumerate(messages):
        for k, call in enumerate(message.get("tool_calls", [])):
            if not call["function"]["arguments"]:
                continue
            found = _one_call(messages, (i, k), text, render)
            if found is None:
                raise ConfigError(
                    f"the chat template does not write the arguments of call {k + 1} of message {i + 1} where they can "
                    "be told from the rest: set tokenize.loss_parts: all, or another model.chat_template"
                )
            ranges.append(found)
    return ranges


def _one_call(messages: list[dict[str, Any]], at: tuple[int, int], text: str, render: Render) -> Range | None:
    arguments = messages[at[0]]["tool_calls"][at[1]]["function"]["arguments"]
    rendered = render(_with_arguments(messages, at, STAND_IN))
    for stand_in in (STAND_IN, f'"{STAND_IN}"'):  # as it is, or as JSON
        found = _compare(text, rendered, stand_in)
        if found and _is_json(text[slice(*found)], arguments):
            return found
    first, last = next(iter(arguments)), next(reversed(arguments))
    renamed = {STAND_IN if key == first else key: value for key, value in arguments.items()}
    start = _compare(text, render(_with_arguments(messages, at, renamed)))
    end = _compare(text, render(_with_arguments(messages, at, {**arguments, last: STAND_IN})))
    return (start[0], end[1]) if start and end and start[0] < end[1] else None


def _with_arguments(messages: list[dict[str, Any]], at: tuple[int, int], arguments: Any) -> list[dict[str, Any]]:
    changed = deepcopy(messages)
    changed[at[0]]["tool_calls"][at[1]]["function"]["arguments"] = arguments
    return changed


def _is_json(text: str, value: Any) -> bool:
    try:
        return json.loads(text) == value
    except ValueError:
        return False


def _compare(text: str, other: str | None, stand_in: str = STAND_IN) -> Range | None:
    """The range of `text` in whose place `other` has the stand-in, once; None where they differ elsewhere too."""
    if other is None or other.count(stand_in) != 1:
        return None
    before, after = other.split(stand_in)
    end = len(text) - len(after)
    return (len(before), end) if text.startswith(before) and text.endswith(after) and len(before) <= end else None


def without(span: Range, ranges: list[Range]) -> Iterator[Range]:
    """What is left of a span when the ranges, which are in order, are taken out."""
    start, end = span
    for a, b in ranges:
        if b <= start or a >= end:
            continue
        if a > start:
            yield start, a
        start = max(start, b)
    if start < end:
        yield start, end
