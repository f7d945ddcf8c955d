"""Formats that become a conversation: `messages` (OpenAI chat), ShareGPT's `conversations`, Alpaca's instructions.

A conversation is a list of messages `{role, content}`. An assistant's message may also have `reasoning_content` (text)
and `tool_calls` (`[{type, id, function: {name, arguments}}]`), a tool's message `name` and `tool_call_id`; the row may
have `tools` (JSON schemas of functions). Calls and tools are kept as JSON text: their shape differs from row to row,
and a column of Arrow would give all rows the keys of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from dayzero.data.rows import Dropped, Example, PaddedRow, Reader, as_text, from_json, kind, needed_text, to_json
from dayzero.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
_MESSAGE = pa.struct(
    [(name, pa.string()) for name in ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id")]
)
SCHEMA = pa.schema([("messages", pa.list_(_MESSAGE)), ("tools", pa.string())])

_SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    "function_call": "assistant",
}
_CHOSEN = "turns are chosen for all rows by tokenize.loss_turns and loss_roles; take the key out, or the row"
_FLAGS = ("weight", "train", "training", "loss")
"""By which a message says whether to learn it."""
_NOT_READ = {
    **dict.fromkeys(_FLAGS, _CHOSEN),
    "function_call": "write it as tool_calls: [{type: function, function: {name, arguments}}]",
    "refusal": "put the text into content where it is to be learnt, or take the row out",
    "audio": "only text can be trained on",
}
"""Keys that say what the assistant did, or whether to learn it: leaving them out would teach something else."""


def messages(reader: Reader) -> Example | Dropped:
    """A row of `messages`, with `system` and `tools` where it has them."""
    found = _list(reader, "messages", "a list of {role, content}")
    name = reader.name("messages")
    done = [
        _message(message, f"{reader.origin}: message {number} of {name!r}", isinstance(reader.row, PaddedRow))
        for number, message in enumerate(found, 1)
    ]
    return conversation(_with_system(done, reader), _tools(reader), reader.id())


def sharegpt(reader: Reader) -> Example | Dropped:
    """A row of `conversations` in turns `{from, value}` (or `{role, content}`), with `system` and `tools` if there."""
    found = _list(reader, "conversations", "a list of {from, value}")
    done: list[dict[str, str]] = []
    padded = isinstance(reader.row, PaddedRow)
    for number, turn in enumerate(found, 1):
        where = f"{reader.origin}: turn {number} of {reader.name('conversations')!r}"
        if isinstance(turn, dict) and {"role", "content"} <= turn.keys():
            done.append(_message(turn, where, padded))
            continue
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            raise DataError(f"{where} has {_keys(turn)}, expected from and value")
        _refuse_unread(turn, where)
        role = _SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
        if role is None:
            raise DataError(f"{where} is from {turn['from']!r}, expected one of {', '.join(_SHAREGPT_ROLES)}")
        text = needed_text(turn["value"], where, "value")
        if turn["from"] == "function_call":
            call = from_json(text, where, "value")
            calls = call if isinstance(call, list) else [call]
            done.append({"role": role, "content": "", "tool_calls": _tool_calls(calls, where, padded)})
        else:
            done.append({"role": role, "content": text})
    return conversation(_with_system(done, reader), _tools(reader), reader.id())


def alpaca(reader: Reader) -> Example | Dropped:
    """A row of `instruction` (with `input` if there is one) and `output`: one question, one answer.

    `history` holds the turns before them, a list of [question, answer].
    """
    instruction, extra = reader.text("instruction"), reader.text("input", optional=True)
    answer = reader.text("output", answer=True)
    if not answer.strip():
        return Dropped("empty")
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    done = []
    for asked, said in (*_history(reader), (question, answer)):
        done += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return conversation(_with_system(done, reader), _tools(reader), reader.id())


def conversation(done: list[dict[str, str]], tools: str | None, row_id: str | None) -> Example | Dropped:
    """The example of checked messages; dropped where the assistant says nothing."""
    if not any(m["role"] == "assistant" and (m["content"].strip() or "tool_calls" in m) for m in done):
        return Dropped("no_assistant_turn")
    question = "\n".join(m["content"] for m in done if m["role"] == "user")
    # a conversation that the assistant opens has no question: the whole of it stands for one
    question = question if question.strip() else "\n".join(m["content"] for m in done)
    length = sum(len(text) for m in done for key, text in m.items() if key != "role") + len(tools or "")
    return Example({"messages": done, **({"tools": tools} if tools else {})}, question, length, row_id)


def load_messages(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The messages and tools of a stored row, as chat templates want them: null keys left out, JSON text read."""
    done = []
    for stored in row["messages"]:
        message = {key: value for key, value in stored.items() if value is not None}
        if "tool_calls" in message:
            message["tool_calls"] = json.loads(message["tool_calls"])
        done.append(message)
    return done, json.loads(row["tools"]) if row.get("tools") else None


def _message(message: Any, where: str, padded: bool) -> dict[str, str]:
    if not isinstance(message, dict) or "role" not in message or not {"content", "tool_calls"} & message.keys():
        raise DataError(f"{where} has {_keys(message)}, expected role and content")
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}, expected one of {', '.join(ROLES)}")
    _refuse_unread(message, where)
    # beside calls or reasoning null says that there is no more; alone it would teach to say nothing
    more = role == "assistant" and any(message.get(key) for key in ("tool_calls", "reasoning_content"))
    content = message.get("content")
    done = {"role": role, "content": "" if more and content is None else _content(content, where)}
    for key, only in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
        if message.get(key) and role != only:
            raise DataError(f"{where} has {key}, which only a message of the role {only} may have, not {role}")
    if reasoning := as_text(message.get("reasoning_content"), where, "reasoning_content"):
        done["reasoning_content"] = reasoning
    if message.get("tool_calls"):
        done["tool_calls"] = _tool_calls(from_json(message["tool_calls"], where, "tool_calls"), where, padded)
    if role == "tool":
        done |= {key: as_text(message[key], where, key) for key in ("name", "tool_call_id") if message.get(key)}
    return done


def _refuse_unread(message: dict[str, Any], where: str) -> None:
    for key, remedy in _NOT_READ.items():
        value = message.get(key)
        if value not in (None, "", {}) and not (key in _FLAGS and value == 1):
            raise DataError(f"{where} has {key} {value!r}, which is not read here: {remedy}")


def _with_system(done: list[dict[str, str]], reader: Reader) -> list[dict[str, str]]:
    """The messages after the row's own `system`; DataError where they have another."""
    system = reader.text("system", optional=True)
    if not system.strip():
        return done
    first = {"role": "system", "content": system}
    told = next((message for message in done if message["role"] == "system"), first)
    if told != first:
        raise DataError(
            f"{reader.origin}: column {reader.name('system')!r} and the system message of the conversation differ: "
            "leave one of them out"
        )
    return done if first in done else [first, *done]


def _history(reader: Reader) -> list[tuple[str, str]]:
    """The earlier turns of a row, (question, answer) each."""
    if not reader.has("history") or not reader.value("history"):
        return []
    where = f"{reader.origin}: column {reader.name('history')!r}"
    turns = from_json(reader.value("history"), where, "it")
    if not isinstance(turns, list) or any(not isinstance(turn, list) or len(turn) != 2 for turn in turns):
        raise DataError(f"{where} is no list of [question, answer]")
    return [(needed_text(asked, where, "it"), needed_text(said, where, "it")) for asked, said in turns]


def _content(value: Any, where: str) -> str:
    """Text, or the joined texts of a list of parts `{type: text, text}`."""
    if not isinstance(value, list):
        return needed_text(value, where, "content")
    parts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type", "text") != "text" or "text" not in part:
            found = part.get("type") if isinstance(part, dict) else kind(part)
            raise DataError(f"{where}: content holds a part of the type {found}, only text can be trained on")
        parts.append(needed_text(part["text"], where, "content"))
    return "".join(parts)


def _tool_calls(calls: Any, where: str, padded: bool) -> str:
    """The calls as JSON text, each `{type, id?, function: {name, arguments}}` with arguments as an object."""
    if not isinstance(calls, list):
        raise DataError(f"{where} has tool_calls of {kind(calls)}, expected a list")
    done = []
    for number, call in enumerate(calls, 1):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where} has tool_calls without a function's name: call {number} is {_keys(call)}")
        given = function.get("arguments")
        arguments = from_json(given, where, f"the arguments of call {number}") if given not in (None, "") else {}
        if not isinstance(arguments, dict):
            raise DataError(f"{where} has tool_calls whose arguments are {kind(arguments)}, expected an object")
        if padded and isinstance(given, dict):
            arguments = _without_nulls(arguments)
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        done.append({"type": "function", **identity, "function": {"name": function["name"], "arguments": arguments}})
    return to_json(done, where, "tool_calls")


def _tools(reader: Reader) -> str | None:
    """The row's tools as JSON text, each `{type: function, function: schema}`; None where there are none."""
    if reader.row.get("functions") and reader.name("tools") != "functions":
        raise DataError(
            f"{reader.origin}: column 'functions' stands beside the conversation and is not read: set data.columns "
            "{tools: functions} to have it as its tools, or take it out"
        )
    if not reader.has("tools") or not reader.value("tools"):
        return None
    where = f"{reader.origin}: column {reader.name('tools')!r}"
    given = reader.value("tools")
    tools = from_json(given, where, "it")
    if not isinstance(tools, list):
        raise DataError(f"{where} holds {kind(tools)}, expected a list of tools")
    if isinstance(reader.row, PaddedRow) and not isinstance(given, str):
        tools = _without_nulls(tools)
    done = []
    for number, tool in enumerate(tools, 1):
        tool = from_json(tool, where, f"tool {number}")
        if isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str):
            tool = {"type": "function", "function": tool}
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict) or "name" not in tool["function"]:
            raise DataError(f"{where}: tool {number} has {_keys(tool)}, expected {{type, function: {{name, ...}}}}")
        done.append(tool)
    return to_json(done, where, "it") if done else None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _list(reader: Reader, column: str, expected: str) -> list[Any]:
    value = from_json(reader.value(column), reader.origin, f"column {reader.name(column)!r}")
    if not isinstance(value, list):
        raise reader.fail(column, expected)
    return value


def _keys(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, dict) and value else kind(value)
