"""Which characters of a rendered conversation are the turns that are supervised.

They come from the template's own {% generation %} blocks or, where it has none, from rendering the conversation up to
each answer, which must be a prefix of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from dayzero.config import Tokenize
from dayzero.data.chat_shapes import Found, Shapes
from dayzero.data.chat_template import ChatTemplate, Message, Tools
from dayzero.data.plain_text import STAND_IN, Range, TextEncoder
from dayzero.errors import ConfigError, DataError


class TurnFinder:
    """Finds the turns of the roles that `options` supervises.

    Args:
        ends: the control tokens that may end a turn, the longest first.
    """

    def __init__(self, template: ChatTemplate, options: Tokenize, ends: tuple[str, ...], texts: TextEncoder) -> None:
        self._template, self._options, self._ends, self._texts = template, options, ends, texts
        self._closing: dict[str, bool] = {}  # whether tokens that follow an answer are its end
        self._prompt: str | None = None  # what the template writes to ask for an answer
        self._checked_markers = False
        self._shapes = Shapes(
            template.source, lambda messages: self._all_turns(messages, None, template.render(messages)[0])
        )

    def find(self, messages: list[Message], tools: Tools) -> Found:
        """The rendered conversation and the character ranges of the turns that are supervised.

        Raises ConfigError where the template's beginnings are not those of the whole, or its blocks hold no answer;
        DataError where it refuses the conversation.
        """
        if self._template.has_markers:
            return self._all_turns(
                messages, tools, *self._template.render(messages, tools, return_assistant_tokens_mask=True)
            )
        text, _ = self._template.render(messages, tools)
        known = self._shapes.find(messages, text) if not tools and self._options.loss_roles == ["assistant"] else None
        return self._all_turns(messages, tools, text) if known is None else (text, known)

    def _all_turns(self, messages: list[Message], tools: Tools, text: str, blocks: Sequence[Range] = ()) -> Found:
        """The conversation that was rendered as `text` and the ranges of its supervised turns: its generation `blocks`
        where the template has some, else what stands between the renderings of two beginnings."""
        roles = self._options.loss_roles
        turns = [i for i, m in enumerate(messages) if m["role"] in roles]
        if self._options.loss_turns == "last":
            turns = turns[-1:]
        spans: list[Range] = []
        marked = [i for i in turns if messages[i]["role"] == "assistant"] if self._template.has_markers else []
        if marked:
            self._check_markers(messages, tools)
            spans = self._with_ends(messages, tools, text, sorted(blocks))
            if self._options.loss_turns == "last":  # whatever comes after the blocks of the turns before
                earlier = messages[: marked[0]]
                if earlier:
                    spans = spans[len(self._template.render(earlier, tools, return_assistant_tokens_mask=True)[1]) :]
            if not spans:
                self._unmarked()
        for i in turns:
            answer = messages[i]["role"] == "assistant"
            if i in marked or not (answer or messages[i]["content"].strip()):
                continue
            after = self._template.render(messages[: i + 1], tools)[0] if i + 1 < len(messages) else text
            if answer:
                before = self._before(messages, i, tools)
                if not text.startswith(before):
                    raise self._unstable(text, before, i, self._stable(messages, tools, text, turns[-1]))
            if not text.startswith(after):
                raise self._unstable(text, after, i, self._stable(messages, tools, text, turns[-1]))
            spans.append((len(before) if answer else self._head(messages[: i + 1], tools, text), len(after)))
        return text, sorted(spans)

    def _before(self, messages: list[Message], i: int, tools: Tools) -> str:
        """The conversation up to answer `i`, as it is when a model is asked for it.

        There is none before an answer that opens the conversation: templates look at the first message, say for
        whether to write a system prompt of their own, and rendered without any they begin otherwise. So that is
        rendered with other words, up to the turn's head, or else to the words.
        """
        if i:
            return self._template.render(messages[:i], tools, add_generation_prompt=True)[0]
        opening = [{"role": "assistant", "content": STAND_IN}]
        before = self._template.render(opening, tools)[0].partition(STAND_IN)[0]
        if self._prompt is None:
            self._prompt = self._generation_prompt()
        at = before.rfind(self._prompt)
        return before if at < 0 else before[: at + len(self._prompt)]

    def _generation_prompt(self) -> str:
        asked = [{"role": "user", "content": STAND_IN}]
        try:
            question = self._template.render(asked)[0]
            return self._template.render(asked, add_generation_prompt=True)[0].removeprefix(question)
        except DataError:
            return ""

    def _stable(self, messages: list[Message], tools: Tools, text: str, turn: int) -> bool:
        """Whether the conversation through that turn, and up to it if it is an answer, is how the whole `text`
        begins."""
        try:
            beginnings = [self._template.render(messages[: turn + 1], tools)[0]]
            if messages[turn]["role"] == "assistant":
                beginnings.append(self._before(messages, turn, tools))
        except DataError:
            return False
        return all(map(text.startswith, beginnings))

    def _head(self, messages: list[Message], tools: Tools, text: str) -> int:
        """Where the content of the last of these messages begins in the conversation: after the turn's head, which no
        one is asked to write and which may hold the same words."""
        *earlier, message = messages
        head, written, _ = self._template.render([*earlier, {**message, "content": STAND_IN}], tools)[0].partition(
            STAND_IN
        )
        contents = {message["content"], message["content"].strip()}
        if not written or not text.startswith(head) or not any(text.startswith(c, len(head)) for c in contents):
            raise ConfigError(
                f"the chat template rewrites the content of message {len(messages)}, of the role {message['role']}, "
                "so it cannot be supervised: leave the role out of tokenize.loss_roles"
            )
        return len(head)

    def _check_markers(self, messages: list[Message], tools: Tools) -> None:
        """Refuse {% generation %} blocks that hold nothing of what an assistant says; the first conversation shows it.

        A template that rewrites what it is given is not told by this.
        """
        if self._checked_markers or not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
            return
        said = [{**m, "content": STAND_IN} if m["role"] == "assistant" and m["content"] else m for m in messages]
        text, blocks = self._template.render(said, tools, return_assistant_tokens_mask=True)
        if STAND_IN in text and not any(STAND_IN in text[start:end] for start, end in blocks):
            self._unmarked()
        self._checked_markers = True

    def _unmarked(self) -> None:
        raise ConfigError(
            "the chat template has {% generation %} blocks but none about what the assistant says, so nothing would be "
            "supervised: set model.chat_template to a FILE with the blocks about the answers, or with none at all"
        )

    def _with_ends(self, messages: list[Message], tools: Tools, text: str, blocks: list[Range]) -> list[Range]:
        """The {% generation %} blocks, each with the end-of-turn token that follows it: many templates leave it out of
        the block, and without it a model never stops."""
        spans = []
        for number, (start, end) in enumerate(blocks):
            limit = blocks[number + 1][0] if number + 1 < len(blocks) else len(text)
            following = text[end:limit]
            token = next((t for t in self._ends if following.lstrip().startswith(t)), "")
            if token and token not in self._closing:  # it may be the next turn's head, after a turn without an end
                self._closing[token] = self._closes(token, number, messages, tools)
            if token and self._closing[token]:
                end += following.find(token) + len(token)
            spans.append((start, end))
        return spans

    def _closes(self, token: str, number: int, messages: list[Message], tools: Tools) -> bool:
        """Whether the token is written after the block of that number even if the conversation ends with its turn."""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            text, blocks = self._template.render(messages[: i + 1], tools, return_assistant_tokens_mask=True)
            if len(blocks) > number:
                return text[sorted(blocks)[number][1] :].lstrip().startswith(token)
        return False

    def _unstable(self, text: str, beginning: str, message: int, last_is_stable: bool) -> ConfigError:
        """The error of a `beginning`, up to that message, that is not how the whole `text` begins; `last_is_stable`:
        the last turn alone could be supervised."""
        whole, part = self._texts.ids(text).tolist(), self._texts.ids(beginning).tolist()
        at = next((k for k, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b), min(len(whole), len(part)))
        decode = self._texts.tokenizer.decode
        seen = [repr(decode(ids[at : at + 1])) if at < len(ids) else "the end" for ids in (whole, part)]
        # where the template has blocks about the answers, only turns of other roles come here
        others = " and ".join(role for role in self._options.loss_roles if role != "assistant")
        way_out = (
            f"leave {others} out of tokenize.loss_roles"
            if self._template.has_markers
            else "mark the answers with {% generation %} in a template of your own (model.chat_template: FILE)"
        )
        last = ", or supervise only the last turn (tokenize.loss_turns: last)" if last_is_stable else ""
        return ConfigError(
            f"the chat template changes a conversation as it goes on around message {message + 1}: token {at} is "
            f"{seen[0]} in the whole and {seen[1]} in its beginning: {way_out}{last}"
        )
