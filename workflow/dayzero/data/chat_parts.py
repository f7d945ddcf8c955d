"""Where a part of a message, its reasoning or the arguments of a tool call, stands in the rendered conversation.

A chat template may write a part in any way, so it is not looked for by its text: the conversation is rendered again
with a stand-in for the part, and the two renderings must be equal on both sides of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from dayzero.data.plain_text import STAND_IN, Range
from dayzero.errors import ConfigError

Render = Callable[[list[dict[str, Any]]], str | None]
"""Renders messages; None where the template refuses them."""

TAG = re.compile(r"<(/?)(think(?:ing)?)>")
"""What reasoning inside the content stands between."""
_CLOSING = re.compile(r"\s*</[\w:-]+>\s*")
_EMPTY = re.compile(r"\s*(?:<(think(?:ing)?)>\s*</\1>|</think(?:ing)?>)\s*")


@dataclass(frozen=True)
class Thought:
    """Reasoning in a rendered conversation."""

    start: int
    end: int
    """With the tags about it, and the white space after them."""
    opens: bool
    """It is what its turn begins with, so that all the template writes before it belongs to it."""


def thinks(message: dict[str, Any]) -> bool:
    """Whether the message is an assistant's with reasoning in it."""
    return message["role"] == "assistant" and bool(
        message.get("reasoning_content", "").strip() or TAG.search(message["content"])
    )


def reasoning(messages: list[dict[str, Any]], text: str, render: Render, *, exactly: bool) -> tuple[list[Thought], int]:
    """The reasoning of assistants in `text`, and how many reasonings the template leaves out.

    Reasoning is `reasoning_content`, and what stands in the content before `</think>` or after `<think>`; the same for
    `<thinking>`. Raises ConfigError where it must be found `exactly` and the template does not write it once.
    """
    thoughts, left_out = [], 0
    for i, message in enumerate(messages):
        if not thinks(message):
            continue
        content = message["content"]
        parts: list[tuple[dict[str, Any], Range | None]] = []
        if message.get("reasoning_content", "").strip():
            parts.append(({**message, "reasoning_content": STAND_IN}, None))
        for start, end in _blocks(content):
            if exactly or content[start:end].strip():  # of a block that holds nothing its tags are masked
                parts.append(({**message, "content": content[:start] + STAND_IN + content[end:]}, (start, end)))
        for changed, place in parts:
            other = render([*messages[:i], changed, *messages[i + 1 :]])
            found = _compare(text, other)
            if found:
                thoughts.append(_thought(text, found, content, place))
            elif place and not content[slice(*place)].strip():
                continue  # nothing is lost, and nothing would be learnt but what a template makes of it
            elif other == text:
                left_out += 1
            elif exactly:
                raise ConfigError(
                    f"the chat template does not write the reasoning of message {i + 1} where it can be told from the "
                    "rest: set tokenize.loss_reasoning: true, or another model.chat_template"
                )
    return thoughts, left_out


def empty_reasoning(turns: list[Range], text: str) -> list[Thought]:
    """The blocks without any reasoning that turns begin with, which many templates write where a message has none; the
    opening tag may stand in the prompt."""
    return [Thought(start, min(found.end(), end), True) for start, end in turns if (found := _EMPTY.match(text, start))]


def trimmed(text: str, thought: Thought) -> Range:
    """Where reasoning and its tags stand, without the white space about them: it may be in one token with an answer."""
    written = text[thought.start : thought.end]
    start = thought.start + len(written) - len(written.lstrip())
    return start, max(start, thought.start + len(written.rstrip()))


def _blocks(content: str) -> list[Range]:
    """Where reasoning stands in a content, without its tags.

    A closing tag without an opening one closes all that was said before it: many templates write the opening tag as
    the end of the prompt. A block that is not closed goes on to the end.
    """
    blocks: list[Range] = []
    opened: tuple[str, int] | None = None
    for tag in TAG.finditer(content):
        closing, name = bool(tag[1]), tag[2]
        if opened is None:
            if closing:
                blocks = [(0, tag.start())]
            else:
                opened = name, tag.end()
        elif closing and name == opened[0]:
            blocks.append((opened[1], tag.start()))
            opened = None
    return [*blocks, (opened[1], len(content))] if opened else blocks


def _thought(text: str, found: Range, content: str, place: Range | None) -> Thought:
    """The reasoning that was found in the text; `place`: where in the content it is, None for `reasoning_content`."""
    start, end = found
    if place is None:
        closing = _CLOSING.match(text, end)
        return Thought(start, closing.end() if closing else end, opens=True)
    before, after = content[: place[0]], content[place[1] :]
    opening = before[before.rfind("<") :] if before else ""
    if opening and (head := text[:start].rstrip()).endswith(opening):
        start = len(head) - len(opening)
    if after:  # a block that is not closed has no tag to go with it
        closing = _CLOSING.match(text, end)
        end = closing.end() if closing else end
    return Thought(start, end, opens=before.strip() == opening)


def tool_arguments(messages: list[dict[str, Any]], text: str, render: Render) -> list[Range]:
    """The ranges of `text` that are the arguments of tool calls: the JSON object, or all that a template of another
    notation writes from the first argument's name to the last one's value. It writes nothing for a call without any.

    Raises ConfigError where the template does not write them once each.
    """
    ranges = []
    for i, message in enumerate(messages):
        for k, call in enumerate(message.get("tool_calls", [])):
            found = _one_call(messages, (i, k), text, render)
            if found is None and not call["function"]["arguments"]:
                continue
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
    if not arguments:
        return None
    first, last = next(iter(arguments)), next(reversed(arguments))
    renamed = {STAND_IN if key == first else key: value for key, value in arguments.items()}
    start = _compare(text, render(_with_arguments(messages, at, renamed)))
    end = _compare(text, render(_with_arguments(messages, at, {**arguments, last: STAND_IN})))
    return (start[0], end[1]) if start and end and start[0] < end[1] else None


def _with_arguments(messages: list[dict[str, Any]], at: tuple[int, int], arguments: Any) -> list[dict[str, Any]]:
    calls = list(messages[at[0]]["tool_calls"])
    calls[at[1]] = {**calls[at[1]], "function": {**calls[at[1]]["function"], "arguments": arguments}}
    return [*messages[: at[0]], {**messages[at[0]], "tool_calls": calls}, *messages[at[0] + 1 :]]


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
