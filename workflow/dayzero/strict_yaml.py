"""YAML with the line of every entry: safe types only, no duplicate keys, numbers that YAML takes for text known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dayzero.errors import ConfigError

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_NUMBER_AS_TEXT = re.compile(r"([-+]?)(\d+)(?:\.(\d*))?[eE]([-+]?)(\d+)")


class Entry(NamedTuple):
    """A value with its place; mappings are `dict[str, Entry]`, everything else is plain Python."""

    value: Any
    where: str
    """`file:line`, or where else it was said."""


def read_yaml(path: str | Path) -> Entry:
    """Read a YAML file into nested entries.

    Raises ConfigError for a missing file, bad syntax, unsafe tags, a duplicate key or an alias inside itself.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_neighbours(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file ({error})") from None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return Entry(None, f"{path}:1") if node is None else _entry(loader, node, str(path), ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    finally:
        loader.dispose()


def plain(value: Any) -> Any:
    """Strip the places: the plain Python value of nested entries."""
    if isinstance(value, dict):
        return {key: plain(entry.value) for key, entry in value.items()}
    return value


def number_of_text(text: Any) -> str | None:
    """How a number that YAML reads as text must be written (`1e-4` -> `1.0e-4`); None if `text` is no such thing."""
    match = _NUMBER_AS_TEXT.fullmatch(text) if isinstance(text, str) else None
    if not match:
        return None
    sign, whole, fraction, exponent_sign, exponent = match.groups()
    return f"{sign}{whole}.{fraction or 0}e{exponent_sign or '+'}{exponent}"


def parse_value(value: Any) -> Any:
    """A value typed on a command line: text is read as YAML, except that `1e-3` is the number it means."""
    if isinstance(value, dict):
        return {str(key): parse_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [parse_value(item) for item in value]
    if not isinstance(value, str):
        return value
    if number_of_text(value):
        return float(value)
    try:
        parsed = yaml.load(value, Loader=_Loader)  # noqa: S506 (a safe loader)
    except yaml.YAMLError:
        return value
    if isinstance(parsed, dict | list):
        return _numbers(parsed)
    return parsed if isinstance(parsed, str | int | float | bool | None) else value


def _numbers(value: Any) -> Any:
    """`1e-3` inside a parsed list or mapping becomes the number."""
    if isinstance(value, dict):
        return {str(key): _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if number_of_text(value) else value


def _entry(loader: Any, node: yaml.Node, file: str, parents: tuple[yaml.Node, ...]) -> Entry:
    where = f"{file}:{node.start_mark.line + 1}"
    if any(node is parent for parent in parents):
        raise ConfigError(f"{where}: an alias that contains itself: write its values out")
    if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN_TAGS:
        raise ConfigError(f"{where}: {node.tag} is not allowed: plain mappings and lists only")
    if isinstance(node, yaml.MappingNode):
        return Entry(_mapping(loader, node, file, (*parents, node)), where)
    if isinstance(node, yaml.SequenceNode):
        return Entry([plain(_entry(loader, item, file, (*parents, node)).value) for item in node.value], where)
    return Entry(loader.construct_object(node, deep=True), where)


def _mapping(loader: Any, node: yaml.MappingNode, file: str, parents: tuple[yaml.Node, ...]) -> dict[str, Entry]:
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(
                f"{file}:{line}: a key must be a plain word, not a list or mapping: put it in quotes if it is text"
            )
        if key_node.value in lines and key_node.tag != "tag:yaml.org,2002:merge":
            raise ConfigError(
                f"{file}:{line}: duplicate key {key_node.value} (first on line {lines[key_node.value]}): keep one"
            )
        lines[key_node.value] = line
    loader.flatten_mapping(node)  # `<<: *defaults`
    entries: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        entry = _entry(loader, value_node, file, parents)
        entries[key_node.value] = Entry(entry.value, f"{file}:{key_node.start_mark.line + 1}")
    return entries


def _neighbours(path: Path) -> str:
    names = sorted(p.stem for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return f"; there are: {', '.join(names)}" if names else ""
