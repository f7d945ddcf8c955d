"""The dotted keys a run can set, what each expects, and the JSON schemas: all read from `config.RunConfig`."""

from __future__ import annotations

import types
import typing
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel

from dayzero.config import RunConfig

Kind = Literal["section", "optional_section", "open", "open_names", "value"]
"""section: fixed keys below; optional_section: may be null; open: free nested keys; open_names: free keys that may
themselves hold dots (file names); value: nothing below."""

EXPERIMENT_KEYS = ("description", "recipe", "defaults", "runs")


def _kind(annotation: Any) -> tuple[Kind, type[BaseModel] | None]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = typing.get_args(annotation) if union else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            return ("optional_section" if union else "section"), option
        if typing.get_origin(option) is dict:
            return ("open" if typing.get_args(option)[1] is Any else "open_names"), None
    return "value", None


def _kinds(model: type[BaseModel], prefix: str = "") -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for name, field in model.model_fields.items():
        if not prefix and name in ("experiment", "run"):
            continue  # given by the file's name and the run's
        kind, below = _kind(field.annotation)
        kinds[prefix + name] = kind
        if below:
            kinds.update(_kinds(below, f"{prefix}{name}."))
    return kinds


KEYS: dict[str, Kind] = _kinds(RunConfig)
"""Every dotted key of a run."""

SECTIONS = [key for key in KEYS if "." not in key]


def expected(key: str) -> str:
    """In words what the value of `key` may be (`an integer above 0, or null`); empty for an unknown key."""
    schema = _schemas().get(key)
    while schema is None and "." in key:  # inside an open mapping
        key = key.rpartition(".")[0]
        schema = _schemas().get(key)
        if schema:
            return _words(_below(schema))
    return _words(schema) if schema else ""


def default_of(key: str) -> Any:
    """The value of `key` where nobody sets it; None where it has no default of its own, as inside an open mapping."""
    return _schemas().get(key, {}).get("default")


def experiment_schema() -> dict[str, Any]:
    """JSON schema of config/experiments/*.yaml, for editors; `load_experiment` checks the same and more."""
    run = run_schema()
    defs = run.pop("$defs")
    sections = {k: v for k, v in run["properties"].items() if k in SECTIONS}
    settings = {
        "type": ["object", "null"],
        "properties": sections,
        "patternProperties": {rf"^({'|'.join(SECTIONS)})\.": {"description": "A dotted key."}},
        "additionalProperties": False,
    }
    for section in defs.values():
        if section.get("type") == "object":
            section["patternProperties"] = {r"\.": {"description": "A dotted key."}}
    recipe = {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        "description": "Recipes of config/recipes, applied in this order before everything else.",
    }
    run_settings = {**settings, "properties": {**sections, "recipe": recipe}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A dayzero experiment",
        "type": "object",
        "required": ["runs"],
        "additionalProperties": False,
        "properties": {
            "description": {"type": "string", "description": "What the experiment asks, for the report's head."},
            "recipe": recipe,
            "defaults": {**settings, "description": "Settings of all runs."},
            "runs": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": run_settings,
                "description": "The rows of the experiment: each run's own settings.",
            },
        },
        "$defs": defs,
    }


def run_schema() -> dict[str, Any]:
    """JSON schema of a run's config.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}


@cache
def _schemas() -> dict[str, dict[str, Any]]:
    """The JSON schema of every dotted key, references followed."""
    whole = RunConfig.model_json_schema()
    found: dict[str, dict[str, Any]] = {}

    def resolve(schema: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in schema:
            return resolve(whole["$defs"][schema["$ref"].rpartition("/")[2]])
        if "anyOf" in schema:
            return {**schema, "anyOf": [resolve(option) for option in schema["anyOf"]]}
        return schema

    def walk(schema: dict[str, Any], prefix: str) -> None:
        for name, below in schema.get("properties", {}).items():
            below = resolve(below)
            found[prefix + name] = below
            for option in below.get("anyOf", [below]):
                walk(option, f"{prefix}{name}.")

    walk(whole, "")
    return found


def _below(schema: dict[str, Any]) -> dict[str, Any]:
    for option in schema.get("anyOf", [schema]):
        if isinstance(option.get("additionalProperties"), dict):
            return option["additionalProperties"]
    return {}


def _words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_words(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    match schema.get("type"):
        case "integer" | "number" as kind:
            return ("an integer" if kind == "integer" else "a number") + _range(schema)
        case "string" if "examples" in schema:
            return "text like " + ", ".join(schema["examples"])
        case "string":
            return "text"
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "array":
            if "prefixItems" in schema:
                return f"a list of {len(schema['prefixItems'])} numbers"
            return f"a list of {_words(schema.get('items', {}))}"
        case "object" if "properties" in schema:
            return "a mapping with keys of " + ", ".join(schema["properties"])
        case "object":
            return "a mapping"
    return "any value"


def _range(schema: dict[str, Any]) -> str:
    limits = [
        f"{word} {schema[key]:g}"
        for key, word in {
            "exclusiveMinimum": "above",
            "minimum": "at least",
            "exclusiveMaximum": "below",
            "maximum": "at most",
        }.items()
        if key in schema
    ]
    return " " + " and ".join(limits) if limits else ""
