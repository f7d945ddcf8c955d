"""Templates that name columns, `"{question}\\n{context}"`: parsed, never executed.

Python's own format strings reach attributes and items (`{x.__class__}`) and call formatting code; only plain column
names are allowed here, so a template can say nothing but which texts stand where.
"""

from __future__ import annotations

import string
from collections.abc import Callable

from dayzero.errors import ConfigError

Part = tuple[str, str | None]
"""Text, and the column whose value follows it (None: nothing follows)."""

SHAPES = (("text",), ("prompt", "completion"), ("user", "assistant"))
"""The keys a `data.template` must have; beside user and assistant there may be `system`."""


def parse_template(text: str, key: str) -> list[Part]:
    """The literal texts of a template and the columns between them; `{{` and `}}` stand for braces.

    Raises ConfigError naming the config `key` for anything but plain column names.
    """
    try:
        fields = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ConfigError(f"{key}: {text!r} is no template ({error}): write {{{{ and }}}} for braces") from error
    parts: list[Part] = []
    for literal, name, form, conversion in fields:
        if name is not None and (not name.strip() or form or conversion or any(c in name for c in ".[]")):
            field = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ConfigError(
                f"{key}: {{{field}}} is not a plain column name: a template holds {{column}} and nothing else "
                "(no attributes, items, conversions or formats); rename the column with data.columns if its name has "
                "such characters"
            )
        parts.append((literal, name))
    return parts


def check_templates(templates: dict[str, str]) -> None:
    """Raise ConfigError unless `data.template` has the keys of one shape, sound templates, and names a column."""
    keys = set(templates)
    if keys - {"system"} not in [set(shape) for shape in SHAPES] or ("system" in keys and "user" not in keys):
        shapes = "; ".join(" + ".join(shape) for shape in SHAPES)
        raise ConfigError(
            f"data.template: has {', '.join(templates) or 'nothing'}, expected {shapes} (with system if wanted)"
        )
    parsed = {name: parse_template(text, f"data.template.{name}") for name, text in templates.items()}
    for name in ("text", "completion", "assistant"):
        if name in parsed and not any(column for _, column in parsed[name]):
            raise ConfigError(
                f"data.template.{name}: names no column, so every row would be the same: write {{column}}"
            )


def fill(parts: list[Part], value: Callable[[str], str]) -> str:
    """The template with each column's `value(name)` in its place."""
    return "".join(literal + ("" if name is None else value(name)) for literal, name in parts)
