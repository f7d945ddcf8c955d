"""Conversations -> token ids and the mask of what is supervised: by default all that the assistant says.

Where the turns stand in the rendered conversation says chat_turns.py. An answer's supervision ends with its end-of-turn
token; where the template has no such token, the tokenizer's EOS ends the conversation. The prompt before an answer is
tokenised exactly as at inference.

The texts of control tokens (`<|im_end|>`) inside a message stay text: only the template writes control tokens. Tags
in an assistant's content (`<think>`, `<tool_call>`) are the exception: they are its to write.

What of the conversation is supervised is chosen by `tokenize.loss_*`; a token with any supervised character is, but
for one with a character of masked reasoning.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import itemgetter

import numpy as np
from transformers import PreTrainedTokenizerBase

from dayzero.config import Tokenize
from dayzero.data import chat_parts
from dayzero.data.chat_template import ChatTemplate, Message, Tools
from dayzero.data.chat_turns import TurnFinder
from dayzero.data.plain_text import STAND_IN, Ids, Mask, Range, TextEncoder
from dayzero.data.tokenizer import special_tokens, tag_pairs
from dayzero.errors import ConfigError, DataError


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it."""

    text: str
    """The marked text."""
    turns: list[Range]
    """Where the supervised turns stand in it, in order."""
    controls: list[Range]
    """Where control tokens do."""
    wanted: list[Range] | None
    """The ranges of the text that are supervised; None: the whole turns."""
    masked: list[Range]
    """Reasoning that is not to be learnt, within turns."""
    unfinished: bool
    """The tokenizer's EOS must end it, as the template has no token for that."""

    def edges(self) -> list[int]:
        """Where the turns begin and end, in turn."""
        return [edge for turn in self.turns for edge in turn]

    def pieces(self) -> list[str]:
        """The text, cut at the edges: every second piece is a turn."""
        return [self.text[start:end] for start, end in pairwise([0, *self.edges(), len(self.text)])]


class ChatEncoder:
    """Encodes conversations with the tokenizer's chat template.

    `counts["reasoning_left_out"]` is how many conversations lost reasoning because the template does not write it.
    `texts` is what it reads texts with. Raises ConfigError where the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Tokenize) -> None:
        self.tokenizer, self.options = tokenizer, options
        self._template = ChatTemplate(tokenizer)
        self.counts: Counter[str] = Counter()
        controls = special_tokens(tokenizer)
        self._tags = tag_pairs(tokenizer) | {token for token in controls if chat_parts.TAG.fullmatch(token)}
        self._ends = tuple(sorted(controls - self._tags, key=len, reverse=True))
        self.texts = TextEncoder(tokenizer)
        self._marking = self.options.special_text != "special"
        self._shown: set[str] = set()  # the parts of rows that the template is known to write
        self._turns = TurnFinder(self._template, options, self._ends, self.texts)

    def learn(self, conversations: Iterable[Rendered]) -> None:
        """Have the tokenizer read conversations together, before `tokenize` asks for each: that is faster."""
        self.texts.learn(conversation.text for conversation in conversations)

    def render(self, messages: Sequence[Message], tools: Tools = None) -> Rendered:
        """The conversation as the template writes it, and what of it is supervised.

        Raises ConfigError where the template's prefixes are not stable or it has no place for the tools or calls of the
        conversation, DataError where it refuses the conversation.
        """
        messages = list(messages)
        if self._marking:
            messages = [self._marked(m) for m in messages]
            tools = self.texts.mark_all(tools)
        self._check_shown(messages, tools)
        text, spans = self._turns.find(messages, tools)
        controls = self.texts.controls(text)
        spans = [(_whole(controls, start), _whole(controls, self._end(text, start, end))) for start, end in spans]
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), "answers overlap"
        wanted, masked = self._parts(messages, tools, text, spans)
        last = spans[-1][1] if spans else 0
        unfinished = bool(spans) and not text[last:].strip() and not text[:last].endswith(self._ends)
        if unfinished:
            text = text[:last]
            controls = [control for control in controls if control[1] <= last]
        return Rendered(text, spans, controls, wanted, masked, unfinished)

    def tokenize(self, conversation: Rendered) -> tuple[Ids, Mask]:
        """Token ids of a rendered conversation and, for each, whether it is supervised.

        Raises ConfigError where an answer does not end, or cannot be told from what stands before it.
        """
        ids, edges = self._cut(conversation)
        mask = np.zeros(len(ids), np.bool_)
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            mask[start:end] = True
        if conversation.wanted is not None:
            mask = self._mask_parts(conversation, ids, conversation.wanted, conversation.masked)
        if conversation.unfinished:
            if self.tokenizer.eos_token_id is None:
                raise ConfigError(
                    "neither the chat template nor the tokenizer ends an answer: add an eos_token to the tokenizer, or "
                    "an end-of-turn token to the template (model.chat_template: FILE)"
                )
            ids = np.append(ids, np.int32(self.tokenizer.eos_token_id))
            mask = np.append(mask, self.options.loss_parts == "all")
        return ids, mask

    def _marked(self, message: Message) -> Message:
        """The message with the control tokens in its texts broken, but for the tags that are an assistant's to write:
        templates look for these, and a model that writes them must be shown them as tokens."""
        role = message["role"]
        marked: Message = {
            "role": role,
            "content": self.texts.mark(message["content"], self._tags if role == "assistant" else ()),
        }
        if len(message) > len(marked):
            more = {key: value for key, value in message.items() if key not in marked}
            marked |= self.texts.mark_all(more)
        return marked

    def _check_shown(self, messages: list[Message], tools: Tools) -> None:
        """Refuse a template that would drop a part of conversations in silence; the first row that has it shows it."""
        if tools and "tools" not in self._shown:
            if self._template.render(messages, tools) == self._template.render(messages, None):
                self._no_place("tools")
            self._shown.add("tools")
        for number, message in enumerate(messages):
            for part in _parts_of(message):
                if part in self._shown:
                    continue
                changed = _with_stand_in(message, part)
                if not self._notices(messages, [*messages[:number], changed, *messages[number + 1 :]], tools):
                    self._no_place(part)
                self._shown.add(part)

    def _notices(self, messages: list[Message], changed: list[Message], tools: Tools) -> bool:
        """Whether the template writes another text for the changed messages."""
        text = self._template.render(messages, tools)[0]
        try:
            return self._template.render(changed, tools)[0] != text
        except DataError:
            return True  # it looks at what it is given, so it does not leave it out

    def _no_place(self, part: str) -> None:
        raise ConfigError(
            f"the chat template does not write {part}, which the data has, so a model would never see them: set "
            f"model.chat_template to a FILE that does, or remove {part} from the data"
        )

    def _parts(
        self, messages: list[Message], tools: Tools, text: str, spans: list[Range]
    ) -> tuple[list[Range] | None, list[Range]]:
        """The ranges of the rendered conversation that are supervised, None for the whole spans, and the reasoning that
        is masked."""

        def render(changed: list[Message]) -> str | None:
            try:
                return self._template.render(changed, tools)[0]
            except DataError:
                return None

        masked = self.options.loss_parts == "all" and not self.options.loss_reasoning
        thoughts: list[chat_parts.Thought] = []
        if any(chat_parts.thinks(message) for message in messages):
            thoughts, left_out = chat_parts.reasoning(messages, text, render, exactly=masked)
            self.counts["reasoning_left_out"] += bool(left_out)
        if self.options.loss_parts == "tool_arguments":
            arguments = chat_parts.tool_arguments(messages, text, render)
            return [(a, b) for a, b in arguments if any(start <= a and b <= end for start, end in spans)], []
        if masked:
            thoughts += chat_parts.empty_reasoning(spans, text)
        if not masked or not thoughts:
            return None, []
        wanted = []
        for start, end in spans:
            inside = [(start if t.opens else t.start, t.end) for t in thoughts if t.start < end and t.end > start]
            wanted += list(chat_parts.without((start, end), sorted(inside)))
        return wanted, [chat_parts.trimmed(text, thought) for thought in thoughts]

    def _mask_parts(self, conversation: Rendered, ids: Ids, wanted: list[Range], masked: list[Range]) -> Mask:
        """The mask of the ranges that are `wanted`, and not `masked`, over tokens that were made of the conversation,
        whole or in pieces."""
        joined, mask = self.texts.supervised(conversation.text, wanted, but=masked)
        if np.array_equal(joined, ids):
            return mask
        at = done = 0
        masks = []
        for lead, piece in self._apart(conversation):
            ranges, but = (
                [(max(a - at, 0), b - at) for a, b in some if a < at + len(piece)] for some in (wanted, masked)
            )
            part, mask = self.texts.supervised(piece, ranges, lead, but)
            assert np.array_equal(part, ids[done : done + len(part)]), "the pieces' own tokens"
            masks.append(mask)
            at, done = at + len(piece), done + len(part)
        return np.concatenate(masks)

    def _end(self, text: str, start: int, end: int) -> int:
        """Where a turn's supervision ends: after its end-of-turn token, without the white space that follows it."""
        said = text[start:end].rstrip()
        return start + len(said) if said.endswith(self._ends) else end

    def _cut(self, conversation: Rendered) -> tuple[Ids, list[int]]:
        """Token ids of the conversation, and where in them its turns begin and end.

        Where a merge would reach over such an edge, what lies between the edges is tokenised piece by piece, so that
        the prompt's tokens stay those seen at inference.
        """
        text, edges = conversation.text, conversation.edges()
        ids = self._ids(text)
        before = self.texts.tokens_before(text, ids, edges, conversation.controls)
        if len(before) == len(edges):
            return ids, before
        parts = [self.texts.ids_after(lead, piece) for lead, piece in self._apart(conversation)]
        exactly = {"clean_up_tokenization_spaces": False}
        joined = np.concatenate(parts)
        if self.tokenizer.decode(joined.tolist(), **exactly) != self.tokenizer.decode(ids.tolist(), **exactly):
            end = edges[len(before)]
            raise ConfigError(
                f"the tokenizer reads {text[max(0, end - 20) : end]!r} and what follows, {text[end : end + 20]!r}, as "
                "one, and as another text apart, so the tokens of prompt and answer cannot be told apart: end the "
                "prompt with a control token or a line break in a template of your own (model.chat_template: FILE)"
            )
        return joined, list(accumulate(map(len, parts[:-1])))

    def _apart(self, conversation: Rendered) -> list[tuple[str, str]]:
        """The pieces, each with a lead: the control token that it follows, or else what other text stands for."""
        text, pieces = conversation.text, conversation.pieces()
        control = {end: text[start:end] for start, end in conversation.controls}
        leads = [control.get(at) or self.texts.lead(p) for at, p in zip(conversation.edges(), pieces[1:], strict=True)]
        return list(zip(["", *leads], pieces, strict=True))

    def _ids(self, text: str) -> Ids:
        return self.texts.ids(text)  # none is added: the template writes BOS itself


CALLS, ARGUMENTS = "tool_calls", "the arguments of tool_calls"
"""Parts of a message that a template may leave out, besides its text."""


def _parts_of(message: Message) -> Iterator[str]:
    """The parts that the message has, by what errors call them."""
    if message["content"].strip():
        yield f"the texts of the role {message['role']}"
    if calls := message.get("tool_calls"):
        yield CALLS
        if any(call["function"]["arguments"] for call in calls):
            yield ARGUMENTS


def _with_stand_in(message: Message, part: str) -> Message:
    """The message with a stand-in for that part, in the first call that has it."""
    if part not in (CALLS, ARGUMENTS):
        return {**message, "content": STAND_IN}
    calls = [*message["tool_calls"]]
    number = next(i for i, call in enumerate(calls) if part == CALLS or call["function"]["arguments"])
    function = calls[number]["function"]
    arguments = function["arguments"]
    changed = {"name": STAND_IN} if part == CALLS else {"arguments": {**arguments, next(iter(arguments)): STAND_IN}}
    calls[number] = {**calls[number], "function": {**function, **changed}}
    return {**message, "tool_calls": calls}


def _whole(controls: Sequence[Range], edge: int) -> int:
    """The edge, or the end of the control token that it would tear apart: text may end one that its head began."""
    at = bisect_left(controls, edge, key=itemgetter(0)) - 1  # the last that begins before it
    return max(edge, controls[at][1]) if at >= 0 else edge
