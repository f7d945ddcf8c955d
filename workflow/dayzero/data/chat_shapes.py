"""Where turns stand in a rendered conversation, found once for all conversations of one shape: of the same roles, and
with the same messages empty.

Most chat templates put what is said into place and never look into it. Such a template is rendered over sealed texts,
which notice being looked into; where turns begin and end among them holds for any other texts, and for the beginnings
of a conversation too, which then need not be rendered for each. A template that does look (for `<think>`, say) is left
to the caller, and so is a conversation that is not, whole, what its shape says.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

from jinja2 import Environment, nodes
from jinja2.exceptions import TemplateSyntaxError

from dayzero.data.plain_text import STAND_IN, Range
from dayzero.errors import ConfigError, DataError

Message = dict[str, Any]
Found = tuple[str, list[Range]]
"""A rendered conversation and ranges of it."""

SHAPES = 1000
"""Shapes that are remembered; conversations of further ones are left to the caller."""
# White space, quotes and letters that whatever changes a text would change. Only trimming is understood.
_SEAL = re.compile(rf"( \n)?{STAND_IN}\"\\É(\d+)é{STAND_IN}(\n )?")
_FILTERS = frozenset(
    [
        "trim",
        "tojson",
        "string",
        "length",
        "list",
        "items",
        "default",
        "d",
        "first",
        "last",
        "map",
        "selectattr",
        "rejectattr",
    ]
)
_METHODS = ("strip", "get", "items", "keys", "values")
"""What a template may call: none of it gives away a text without its seal, but for tojson, which breaks it and so may
only be written out."""


class _LookedIntoError(Exception):
    pass


class _Sealed(str):
    """A text that is not blank and can be written, joined and trimmed, but not looked into."""

    @classmethod
    def number(cls, number: int) -> _Sealed:
        """The stand-in for text `number`, which a match of `_SEAL` tells again."""
        return cls(f' \n{STAND_IN}"\\É{number}é{STAND_IN}\n ')

    def __add__(self, other: str) -> _Sealed:
        return _Sealed(str.__add__(self, other))

    def __radd__(self, other: str) -> _Sealed:
        return _Sealed(str.__add__(other, self))

    def strip(self, chars: str | None = None, /) -> _Sealed:
        return _look() if chars is not None else _Sealed(str.strip(self))

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return False if other is None or (type(other) is str and not other) else _look()

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name) if name == "strip" or name.startswith("__") else _look()


def _look(*_: Any, **__: Any) -> NoReturn:
    raise _LookedIntoError


_LOOKS = ("len", "contains", "getitem", "iter", "hash", "lt", "le", "gt", "ge", "mul", "rmul", "mod", "rmod", "format")
for _name in _LOOKS:
    setattr(_Sealed, f"__{_name}__", _look)


@dataclass(frozen=True)
class _Layout:
    """A rendered conversation with its texts taken out, and ranges of it."""

    literals: list[str]
    """What stands before, between and after the texts."""
    texts: list[tuple[int, bool]]
    """The message whose content each is, and whether the template trims it."""
    edges: list[tuple[int, int]]
    """Where the ranges begin and end, in turn: texts before that place, and characters of literals."""

    @classmethod
    def of(cls, rendered: Found) -> _Layout | None:
        """The layout of a conversation of sealed texts; None where they were changed, or written in part."""
        text, ranges = rendered
        seals = list(_SEAL.finditer(text))
        if text.count(STAND_IN) != 2 * len(seals) or any((seal[1] is None) != (seal[3] is None) for seal in seals):
            return None
        cuts = [0, *(edge for seal in seals for edge in seal.span()), len(text)]
        literals = [text[start:stop] for start, stop in zip(cuts[::2], cuts[1::2], strict=True)]
        ends = [seal.end() for seal in seals]
        sealed = [0, *accumulate(len(seal[0]) for seal in seals)]
        edges = [(before := bisect_right(ends, edge), edge - sealed[before]) for found in ranges for edge in found]
        return cls(literals, [(int(seal[2]), seal[1] is None) for seal in seals], edges)

    def fill(self, messages: Sequence[Message]) -> Found:
        """The conversation with these messages' contents, and its ranges."""
        contents = [messages[i]["content"].strip() if trim else messages[i]["content"] for i, trim in self.texts]
        pieces = [piece for pair in zip(self.literals, contents, strict=False) for piece in pair]
        written = [0, *accumulate(map(len, contents))]
        edges = [written[before] + literal for before, literal in self.edges]
        return "".join([*pieces, self.literals[-1]]), list(zip(edges[::2], edges[1::2], strict=True))


class Shapes:
    """Finds the turns of conversations by their shapes.

    Args:
        template: the chat template.
        spans: renders a conversation and finds its turns, with all that must be checked.
    """

    def __init__(self, template: str, spans: Callable[[list[Message]], Found]) -> None:
        self._spans = spans
        self._known: dict[tuple[tuple[str, bool], ...], _Layout | None] = {}
        self._places = SHAPES if _keeps_seals(template) else 0

    def find(self, messages: Sequence[Message], text: str) -> list[Range] | None:
        """The turns of a conversation that was rendered as `text`; None where its shape does not tell."""
        if any(m.keys() != {"role", "content"} or (m["content"] and not m["content"].strip()) for m in messages):
            return None
        shape = tuple((m["role"], not m["content"]) for m in messages)
        if shape not in self._known:
            if len(self._known) >= self._places:
                return None
            self._known[shape] = self._learn(shape)
        layout = self._known[shape]
        if layout is None:
            return None
        filled, ranges = layout.fill(messages)
        return ranges if filled == text else None

    def _learn(self, shape: tuple[tuple[str, bool], ...]) -> _Layout | None:
        contents = ("" if empty else _Sealed.number(i) for i, (_, empty) in enumerate(shape))
        sealed = [{"role": role, "content": content} for (role, _), content in zip(shape, contents, strict=True)]
        try:
            return _Layout.of(self._spans(sealed))
        except (_LookedIntoError, ConfigError, DataError):
            return None


def _keeps_seals(template: str) -> bool:
    """Whether the template makes no copy of a text that may be looked into unseen, as joining by `~` would."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)  # noqa: S701 (never rendered)
    except TemplateSyntaxError:
        return False  # rendering it says more

    written = sum(_json_written(value) for output in tree.find_all(nodes.Output) for value in output.nodes)
    return not (
        any(tree.find_all((nodes.Concat, nodes.Macro, nodes.CallBlock, nodes.AssignBlock)))
        or any(not _keeps_seal(filtered) for filtered in tree.find_all(nodes.Filter))
        or any(
            isinstance(call.node, nodes.Getattr) and call.node.attr not in _METHODS
            for call in tree.find_all(nodes.Call)
        )
        or any(not isinstance(_constant(remainder.right), int) for remainder in tree.find_all(nodes.Mod))
        or any(_may_search(compare) for compare in tree.find_all(nodes.Compare))
        or any(test.name == "in" for test in tree.find_all(nodes.Test))
        or written < sum(filtered.name == "tojson" for filtered in tree.find_all(nodes.Filter))
    )


def _constant(node: nodes.Node) -> Any:
    return node.value if isinstance(node, nodes.Const) else None


def _keeps_seal(filtered: nodes.Filter) -> bool:
    """Whether the filter does, and what it applies where it is given the name of another filter or of a test."""
    named = filtered.args[:2] if filtered.name in ("map", "selectattr", "rejectattr") else []
    return filtered.name in _FILTERS and all(_constant(it) not in (None, "in", "tojson") for it in named)


def _may_search(compare: nodes.Compare) -> bool:
    """Whether it may look for a sealed text in another text, which would not notice."""
    searched = [operand.expr for operand in compare.ops if operand.op in ("in", "notin")]
    return not isinstance(_constant(compare.expr), str) and any(
        not isinstance(it, nodes.List | nodes.Tuple) for it in searched
    )


def _json_written(node: nodes.Node) -> int:
    """How many values turned to JSON are written out where this expression is."""
    if isinstance(node, nodes.Add):
        return _json_written(node.left) + _json_written(node.right)
    if isinstance(node, nodes.CondExpr):
        return _json_written(node.expr1) + (_json_written(node.expr2) if node.expr2 is not None else 0)
    return int(isinstance(node, nodes.Filter) and node.name == "tojson")
