"""docs/configuration.md, made from `config/`: `python -m dayzero.reference docs/configuration.md`."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dayzero.config import RunConfig

HEAD = """# Every key of a run

Made from `workflow/dayzero/config/` by `python -m dayzero.reference docs/configuration.md`; a test holds the two
together. Keys may be nested or dotted (`train.optimizer.lr: 2.0e-4`). Recipe, experiment, run and command line are
merged in this order, later ones winning. An unknown key, a wrong type or an impossible combination is refused before
any job starts.
"""


def reference() -> str:
    """The page as Markdown: a table for each section, a row for each key."""
    return HEAD + "".join(_section(name, model) for name, model in _sections("", RunConfig))


def _sections(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, model
    for name, field in model.model_fields.items():
        if inner := _inner(field):
            if prefix == "resources" and name not in ("fetch", "train"):
                continue  # the stages but train have the same keys
            yield from _sections(f"{prefix}.{name}".lstrip("."), inner)


def _section(name: str, model: type[BaseModel]) -> str:
    rows = []
    for key, field in model.model_fields.items():
        if not _inner(field):
            dotted = f"{name}.{key}".lstrip(".")
            meaning = _text(field.description)
            rows.append(f"| `{dotted}` | {_type(field.annotation)} | {_default(field)} | {meaning} |")
    if not rows:
        return ""
    title = {"": "run", "resources.fetch": "resources.STAGE"}.get(name, name)
    table = "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])
    return f"\n## {title}\n\n{_text(model.__doc__)}\n\n{table}\n".replace("`resources.fetch.", "`resources.STAGE.")


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(a) for a in arguments)
    if annotation is type(None):
        return "null"
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    if origin in (list, dict, tuple):
        return f"{origin.__name__} of {', '.join(dict.fromkeys(_type(a) for a in arguments))}"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "anything"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    return f"`{json.dumps(value)}`"


def _text(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
