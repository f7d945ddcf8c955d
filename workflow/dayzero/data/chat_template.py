"""A tokenizer's chat template: what it writes for a conversation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from traceback import walk_tb
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dayzero.data.plain_text import Range
from dayzero.data.tokenizer import syntax_fault
from dayzero.errors import ConfigError, DataError

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
_FAULTS = (TemplateError, TypeError, AttributeError, LookupError, ArithmeticError, ValueError, RecursionError)
"""What a template raises on purpose, and what its expressions may."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """Renders conversations. Raises ConfigError where the tokenizer has no chat template, or one that is no Jinja."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer in {tokenizer.name_or_path} has no chat template for data of format messages: "
                "set model.chat_template to a template FILE, or make a format prompt_completion of the data (with "
                "data.template)"
            )
        self.source: str = tokenizer.get_chat_template()
        self._name = getattr(tokenizer, "chat_template_file", None) or f"of the tokenizer in {tokenizer.name_or_path}"
        if fault := syntax_fault(self.source):
            raise ConfigError(
                f"the chat template {self._name}, line {fault[0]}: {fault[1]}: set model.chat_template to a FILE "
                "without the fault"
            )
        self.has_markers = bool(_GENERATION.search(self.source))
        """It has {% generation %} blocks."""
        self._variables = dict(tokenizer.special_tokens_map)

    def render(self, messages: Sequence[Message], tools: Tools = None, **options: Any) -> tuple[str, list[Range]]:
        """The rendered text and, with `return_assistant_tokens_mask`, the character ranges of its {% generation %}
        blocks. Raises DataError where it refuses the conversation."""
        variables: dict[str, Any] = {**self._variables, **options}
        try:
            # What apply_chat_template itself calls; that gives token masks only, and those only for fast tokenizers.
            schemas: Any = tools
            rendered: Any = render_jinja_template([list(messages)], schemas, chat_template=self.source, **variables)
        except _FAULTS as error:
            roles = ", ".join(m["role"] for m in messages) or "nothing"
            said = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise DataError(
                f"the chat template refuses a conversation of {roles} ({said}; {self._name}{_line(error)}): change the "
                "roles, set model.chat_template, or set such rows aside (data.on_bad_row: reject)"
            ) from error
        texts, spans = rendered
        return texts[0], spans[0] if spans else []


def _line(error: BaseException) -> str:
    """Where in the template an error was raised; empty where that is not known."""
    lines = [number for frame, number in walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return f", line {lines[-1]}" if lines else ""
