"""Nested settings whose ends know their value, their place and how they got there; merged layer over layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dayzero.config_errors import Problem, unknown_key
from dayzero.config_keys import KEYS, expected
from dayzero.strict_yaml import Entry, plain

RECIPE, DEFAULTS, RUN, COMMAND_LINE, COMMAND_LINE_RUN = range(5)
"""Where a setting comes from, in merge order."""


class Leaf(NamedTuple):
    """A value that was set."""

    value: Any
    where: str
    level: int


Tree = dict[str, Any]  # nested; the ends are Leaf


def read_layer(entries: Mapping[str, Entry], level: int, problems: list[Problem], prefix: str = "") -> Tree:
    """Entries with nested or dotted keys as one nested tree; what cannot stand where it does is added to `problems`."""
    tree: Tree = {}
    for key, entry in entries.items():
        path = _key_path(prefix, key)
        if path is None:
            problems.append(unknown_key(entry.where, prefix + key))
            continue
        dotted = ".".join(path)
        kind = KEYS.get(dotted, "value")
        value: Any
        if kind in ("section", "optional_section") and isinstance(entry.value, dict):
            value = read_layer(entry.value, level, problems, f"{dotted}.")
        elif kind == "section":
            problems.append(Problem(entry.where, dotted, f"expected {expected(dotted)}", plain(entry.value)))
            continue
        else:
            value = _leaves(entry, level, split=kind == "open")
        below = path[prefix.count(".") :]
        problems += [
            Problem(entry.where, twice, "said twice in the same place: keep one")
            for twice in _put(tree, below, value, dotted)
        ]
    return tree


def _put(tree: Tree, path: list[str], value: Any, dotted: str) -> list[str]:
    """Put `value` into `tree`; return the keys that were there already."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            return [dotted]
    twice = list(_doubles(tree[path[-1]], value, dotted)) if path[-1] in tree else []
    merge(tree, {path[-1]: value})
    return twice


def _key_path(prefix: str, key: str) -> list[str] | None:
    """`prefix` + dotted `key` as a list of names; None where no such key exists."""
    path = prefix.rstrip(".").split(".") if prefix else []
    parts = key.split(".")
    while parts:
        path.append(parts.pop(0))
        kind = KEYS.get(".".join(path))
        if kind is None:
            return None
        if kind == "open":
            return path + parts
        if kind == "open_names":
            return path + ([".".join(parts)] if parts else [])
        if kind == "value":
            return None if parts else path
    return path


def _leaves(entry: Entry, level: int, *, split: bool) -> Any:
    """A value, or the tree of an open mapping; `split`: keys may be dotted."""
    if not isinstance(entry.value, dict):
        return Leaf(entry.value, entry.where, level)
    tree: Tree = {}
    for key, below in entry.value.items():
        value = _leaves(below, level, split=split)
        for part in reversed(key.split(".")[1:] if split else []):
            value = {part: value}
        merge(tree, {key.split(".")[0] if split else key: value})
    return tree


def merge(tree: Tree, over: Tree) -> None:
    """Merge `over` into `tree`: mappings merge deep, everything else replaces."""
    for key, value in over.items():
        if isinstance(value, dict):
            if not isinstance(tree.get(key), dict):
                tree[key] = {}
            merge(tree[key], value)
        else:
            tree[key] = value


def _doubles(old: Any, new: Any, key: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old.keys() & new.keys():
            yield from _doubles(old[name], new[name], f"{key}.{name}")
    else:
        yield key


def values(tree: Tree) -> dict[str, Any]:
    return {key: values(value) if isinstance(value, dict) else value.value for key, value in tree.items()}


def walk(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def locate(tree: Tree, path: list[str]) -> tuple[str, Leaf]:
    """The deepest key along `path` that was set, and its leaf (a mapping's first, with the whole mapping as value)."""
    node: Any = tree
    found: list[str] = []
    for part in path:
        if not isinstance(node, dict) or part not in node:
            break
        node = node[part]
        found.append(part)
    if isinstance(node, Leaf):
        return ".".join(found), node
    first = next(walk(node), ("", Leaf(None, "", RUN)))[1]
    return ".".join(found), Leaf(values(node), first.where, first.level)
