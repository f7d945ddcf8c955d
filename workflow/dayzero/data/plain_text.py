"""Tokenising a text in which some control tokens are meant and others are only written about.

A chat template writes control tokens (`<|im_end|>`) that the tokenizer must read as such; the same characters inside a
message are somebody's words, and reading them as control tokens would let a user's text end the turn. `mark` breaks
those words with a character that no text holds; `ids` then reads whole control tokens as such and broken ones as text.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, processors
from transformers import PreTrainedTokenizerBase

from dayzero.data.tokenizer import anchors, special_token_pattern, special_tokens, text_ids
from dayzero.errors import ConfigError, DataError

BREAK, STAND_IN, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
"""Noncharacters: Unicode keeps them for a program's own use (https://www.unicode.org/versions/latest, section 23.7)."""

Range = tuple[int, int]
Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]
HEADS, LONGEST_HEAD = 1000, 200
"""Beginnings of turns that are remembered with their tokens, and the characters of the longest."""


class TextEncoder:
    """Token ids of marked texts.

    Where nothing is marked the ids are the tokenizer's own, so marking costs only the texts that need it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._pattern = special_token_pattern(tokenizer)
        self._starts = {token[0] for token in special_tokens(tokenizer)}
        self._twin: Tokenizer | None = None
        self._original: dict[int, int] = {}
        self._aliases: dict[str, str] = {}
        self._known: dict[str, Ids] = {}
        self._heads: dict[str, list[int]] = {}
        self.anchors = anchors(tokenizer)
        """See `lead`; the first serves nearly always."""
        fast = isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer)
        self._control_ids: dict[str, int] = {}
        for token in special_tokens(tokenizer) if fast else ():
            control = tokenizer.convert_tokens_to_ids(token)
            assert isinstance(control, int)
            self._control_ids[token] = control

    def mark(self, text: str, but: Collection[str] = ()) -> str:
        """The text with every control token in it broken, `but` for those. Raises DataError where it holds one of our
        own characters."""
        if not text.isascii() and any(c in text for c in (BREAK, STAND_IN, OPEN, CLOSE)):
            raise DataError("the text holds a noncharacter from U+FDD0 to U+FDD3, which no text should: remove it")
        if self._pattern is None or not self._may_hold_controls(text):
            return text
        parts, done, match = [], 0, self._pattern.search(text)
        while match:
            following = match.end()
            if match[0] not in but:
                following = match.start() + 1
                parts += [text[done:following], BREAK]
                done = following
            match = self._pattern.search(text, following)
        return "".join([*parts, text[done:]]) if parts else text

    def mark_all(self, value: Any) -> Any:
        """A JSON value with all its texts, keys too, marked. Raises DataError where it is nested too deep."""
        try:
            return self._mark_all(value)
        except RecursionError:
            raise DataError("a value is nested too deep for a chat template to write: flatten it") from None

    def _mark_all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, dict):
            return {self.mark(k): self._mark_all(v) for k, v in value.items()}
        return [self._mark_all(v) for v in value] if isinstance(value, list) else value

    def ids(self, text: str) -> Ids:
        """Token ids of a marked text, without any the tokenizer would add."""
        if BREAK in text:
            return np.array(self._encode(self._aliased(text)[0])[0], np.int32)
        known = self._known.get(text)
        return text_ids(self.tokenizer, [text])[0] if known is None else known

    def lead(self, text: str) -> str:
        """What to put before a marked text that goes on another one, so that it has no space of a beginning: the text's
        own tokens are those after the lead's. Nothing where the tokenizer needs none, or the text merges with all."""
        for anchor in self.anchors if text else []:
            before = self.ids(anchor)
            if np.array_equal(self.ids(anchor + text)[: len(before)], before):
                return anchor
        return ""

    def ids_after(self, lead: str, text: str) -> Ids:
        """Token ids of a marked text after a `lead` that was found for it."""
        return self.ids(lead + text)[len(self.ids(lead)) :] if lead else self.ids(text)

    def learn(self, texts: Iterable[str]) -> None:
        """Read marked texts together, which `ids` then knows until the next call."""
        unmarked = list({text for text in texts if BREAK not in text})
        self._known = dict(zip(unmarked, text_ids(self.tokenizer, unmarked), strict=True))

    def controls(self, text: str) -> list[Range]:
        """Where control tokens stand in a text."""
        if self._pattern is None or not self._may_hold_controls(text):
            return []
        return [match.span() for match in self._pattern.finditer(text)]

    def _may_hold_controls(self, text: str) -> bool:
        return any(c in text for c in self._starts)  # faster than the pattern

    def tokens_before(self, text: str, ids: Ids, ends: Sequence[int], controls: Sequence[Range]) -> list[int]:
        """How many of a marked text's `ids` are the tokens of its first characters, up to each of the `ends`.

        Only up to the first of the ends, which are ascending, where the text up to it on its own has other tokens.
        Control tokens, at the ranges `controls`, cut a text apart before anything else is done to it, so up to the last
        of them the tokens are those of the whole, and only what follows it is read again.
        """
        places = self._places(text, ids, controls)
        found: list[int] = []
        for end in ends:
            last = bisect_right(controls, end, hi=len(places), key=itemgetter(1)) - 1
            start, place = (controls[last][0], places[last]) if last >= 0 else (0, 0)
            head = self._head(text[start:end])
            if ids[place : place + len(head)].tolist() != head:
                break
            found.append(place + len(head))
        return found

    def _places(self, text: str, ids: Ids, controls: Sequence[Range]) -> list[int]:
        """Where the control tokens of an unmarked text stand in its ids; nothing where the two do not agree."""
        if not self._control_ids or BREAK in text:
            return []
        written = [self._control_ids[text[start:end]] for start, end in controls]
        is_written = np.zeros(len(ids), np.bool_)
        for control in set(written):
            is_written |= ids == control
        places = is_written.nonzero()[0]
        return places.tolist() if ids[places].tolist() == written else []

    def _head(self, text: str) -> list[int]:
        """The ids of what a control token is followed by up to an answer, which is mostly the same."""
        if len(text) > LONGEST_HEAD:
            return self.ids(text).tolist()
        if text not in self._heads:
            if len(self._heads) >= HEADS:
                self._heads.clear()
            self._heads[text] = self.ids(text).tolist()
        return self._heads[text]

    def supervised(
        self, text: str, ranges: Sequence[Range], lead: str = "", but: Sequence[Range] = ()
    ) -> tuple[Ids, Mask]:
        """Token ids of a marked text after a `lead`, and for each whether it holds a character of one of the ranges,
        and none of those of `but`."""
        if lead:
            before, by = len(self.ids(lead)), len(lead)
            ranges, but = ([(start + by, end + by) for start, end in some] for some in (ranges, but))
            ids, mask = self.supervised(lead + text, ranges, but=but)
            return ids[before:], mask[before:]
        aliased, places, starts = self._aliased(text)
        tokens, offsets = self._encode(aliased)

        def place(at: int) -> int:
            k = bisect_right(places, at) - 1
            following = starts[k + 1] if k + 1 < len(starts) else len(aliased)
            return min(starts[k] + at - places[k], following)

        def touched(some: Sequence[Range]) -> Mask:
            placed = [(place(start), place(end)) for start, end in some]
            return np.array([any(start < b and a < end for a, b in placed) for start, end in offsets], np.bool_)

        found = touched(ranges)
        return np.array(tokens, np.int32), found & ~touched(but) if but else found

    def _aliased(self, text: str) -> tuple[str, list[int], list[int]]:
        """The text without marks and with control tokens renamed; where its pieces began before, and begin now."""
        self._prepare()
        out, places, starts, length = [], [0], [0], 0
        done = 0
        while done < len(text):
            match = self._pattern.search(text, done) if self._pattern else None
            while match and text.startswith(BREAK, match.end()):  # a broken token of one character
                match = self._pattern.search(text, match.end()) if self._pattern else None
            end = match.start() if match else len(text)
            for piece in text[done:end].split(BREAK):
                out.append(piece)
                length += len(piece)
                done += len(piece) + 1
                places.append(done)
                starts.append(length)
            done = end
            places[-1] = end
            if match:
                out.append(self._aliases[match[0]])
                length += len(out[-1])
                done = match.end()
                places.append(done)
                starts.append(length)
        return "".join(out), places, starts

    def _prepare(self) -> None:
        """Make a twin of the tokenizer that reads control tokens as text, and aliases of them as control tokens."""
        if self._twin is not None:
            return
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(
                f"the tokenizer in {self.tokenizer.name_or_path} has no tokenizer.json, which telling control tokens "
                "from text needs: convert it, or set tokenize.special_text: special and leave the loss_ keys"
            )
        controls = special_tokens(self.tokenizer)
        made = json.loads(backend.to_str())
        for token in made["added_tokens"]:  # else the twin would go on reading those that are not called special
            token["special"] = token["special"] or token["content"] in controls
        twin = Tokenizer.from_str(json.dumps(made))
        twin.no_truncation()
        twin.no_padding()
        twin.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        known = {token.content: token for token in self.tokenizer.added_tokens_decoder.values()}
        for number, text in enumerate(sorted(controls)):
            alias = self._aliases[text] = f"{OPEN}{number}{CLOSE}"
            like = known.get(text)
            flags = {f: getattr(like, f) for f in ("lstrip", "rstrip", "single_word", "normalized")} if like else {}
            # A token that is looked for after normalisation must not itself be changed by it, or it is never found.
            changed = twin.normalizer is not None and twin.normalizer.normalize_str(alias) != alias
            flags["normalized"] = flags.get("normalized", False) and not changed
            twin.add_tokens([AddedToken(alias, special=False, **flags)])
            own = self.tokenizer.convert_tokens_to_ids(text)
            assert isinstance(own, int)
            self._original[twin.token_to_id(alias) or 0] = own
        twin.encode_special_tokens = True
        self._twin = twin

    def _encode(self, aliased: str) -> tuple[list[int], list[Range]]:
        assert self._twin is not None
        encoding = self._twin.encode(aliased, add_special_tokens=False)
        return [self._original.get(i, i) for i in encoding.ids], encoding.offsets
