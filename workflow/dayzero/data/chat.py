"""Conversations -> token ids and the mask of what the assistant says.

Which characters of the rendered conversation are the assistant's comes from the template's own {% generation %} blocks
or, where it has none, from rendering the conversation up to each answer, which must be a prefix of the whole. An
answer's supervision ends with its end-of-turn token; where the template has no such token, the tokenizer's EOS ends the
conversation. The prompt before an answer is tokenised exactly as at inference.

The texts of control tokens (`<|im_end|>`) inside a message are read as control tokens, as in every server that uses
the template: they are part of the format. Rows that hold them are counted by the caller.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dayzero.data.tokenizer import special_tokens
from dayzero.errors import ConfigError, DataError

Message = dict[str, str]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatEncoder:
    """Encodes conversations with the tokenizer's chat template.

    Raises ConfigError where the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer in {tokenizer.name_or_path} has no chat template for data of format messages: "
                "set model.chat_template to a template FILE, or use format prompt_completion"
            )
        self.tokenizer = tokenizer
        self.template: str = tokenizer.get_chat_template()
        self.has_markers = bool(_GENERATION.search(self.template))
        self._special = tuple(special_tokens(tokenizer))

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation and, for each, whether it is supervised.

        Raises ConfigError where the template's prefixes are not stable, DataError where it refuses the conversation.
        """
        text, spans = self._marked_spans(messages) if self.has_markers else self._prefix_spans(messages)
        spans = [(start, self._end(text, start, end)) for start, end in spans]
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), "answers overlap"
        last = spans[-1][1] if spans else 0
        unfinished = bool(spans) and not text[last:].strip() and not text[:last].endswith(self._special)
        if unfinished:
            text = text[:last]
        ids, cuts = self._cut([text[i:j] for i, j in _between(spans, len(text))])
        mask = [k % 2 == 1 for k, n in enumerate(cuts) for _ in range(n)]
        if unfinished:
            if self.tokenizer.eos_token_id is None:
                raise ConfigError(
                    "neither the chat template nor the tokenizer ends an answer: add an eos_token to the tokenizer, or "
                    "an end-of-turn token to the template (model.chat_template: FILE)"
                )
            ids, mask = [*ids, self.tokenizer.eos_token_id], [*mask, True]
        return ids, mask

    def _marked_spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation and the character ranges of its {% generation %} blocks."""
        text, spans = self._render(messages, return_assistant_tokens_mask=True)
        return text, sorted(spans)

    def _prefix_spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The rendered conversation and the character ranges between each prompt and the end of its answer."""
        text = self._render(messages)[0]
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], add_generation_prompt=True)[0]
            after = self._render(messages[: i + 1])[0]
            for prefix in (before, after):
                if not text.startswith(prefix):
                    self._refuse(text, prefix, i)
            spans.append((len(before), len(after)))
        return text, spans

    def _render(self, messages: Sequence[Message], **options: Any) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and, on demand, the character ranges of its {% generation %} blocks."""
        variables: dict[str, Any] = {**self.tokenizer.special_tokens_map, **options}
        try:
            # What apply_chat_template itself calls; that gives token masks only, and those only for fast tokenizers.
            rendered: Any = render_jinja_template([list(messages)], chat_template=self.template, **variables)
        except TemplateError as error:
            roles = ", ".join(m["role"] for m in messages) or "nothing"
            raise DataError(
                f"the chat template refuses a conversation of {roles} ({error}): change the roles, or set "
                "model.chat_template"
            ) from error
        texts, spans = rendered
        return texts[0], spans[0] if spans else []

    def _end(self, text: str, start: int, end: int) -> int:
        """Where an answer's supervision ends: after its end-of-turn token, without the white space that follows it."""
        answer = text[start:end].rstrip()
        if answer.endswith(self._special):
            return start + len(answer)
        if not self.has_markers:
            return end
        # {% generation %} blocks often leave out the end-of-turn token, without which a model never stops.
        following = next((s for s in sorted(self._special, key=len, reverse=True) if text.startswith(s, end)), "")
        return end + len(following)

    def _cut(self, pieces: list[str]) -> tuple[list[int], list[int]]:
        """Token ids of the joined pieces and how many belong to each.

        Where a merge would reach over a piece's end, the pieces are tokenised on their own, so that the prompt's tokens
        stay those seen at inference.
        """
        text = "".join(pieces)
        ids = self._ids(text)
        counts, done, length = [], 0, 0
        for piece in pieces[:-1]:
            length += len(piece)
            prefix = self._ids(text[:length])
            if ids[: len(prefix)] != prefix:
                break
            counts.append(len(prefix) - done)
            done = len(prefix)
        else:
            return ids, [*counts, len(ids) - done]
        parts = [self._ids(piece) for piece in pieces]
        exactly = {"clean_up_tokenization_spaces": False}
        joined = [token for part in parts for token in part]
        if self.tokenizer.decode(joined, **exactly) != self.tokenizer.decode(ids, **exactly):
            self._refuse(text, text[:length], None)
        return joined, [len(part) for part in parts]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes BOS itself

    def _refuse(self, text: str, prefix: str, message: int | None) -> None:
        whole, part = self._ids(text), self._ids(prefix)
        at = next((k for k, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b), min(len(whole), len(part)))
        seen = [repr(self.tokenizer.decode(ids[at : at + 1])) if at < len(ids) else "the end" for ids in (whole, part)]
        where = "" if message is None else f" around message {message + 1}"
        raise ConfigError(
            f"the chat template changes a conversation as it goes on{where}: token {at} is {seen[0]} in the "
            f"whole and {seen[1]} in its beginning: mark the answers with {{% generation %}} in a template of your own "
            "(model.chat_template: FILE)"
        )


def _between(spans: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """Cut 0..length at the spans: every second range is a span."""
    edges = [0, *(edge for span in spans for edge in span), length]
    return list(pairwise(edges))
