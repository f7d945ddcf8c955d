"""Settings from the command line: Snakemake's --config, and `key=value` texts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dayzero.config_errors import ConfigProblems, Problem, nearest
from dayzero.config_keys import SECTIONS
from dayzero.errors import ConfigError
from dayzero.nested import flatten
from dayzero.strict_yaml import Entry, parse_value

PLACE = "command line"


def parse_assignments(texts: Iterable[str]) -> dict[str, Any]:
    """`["train.max_steps=10", ...]` as dotted key -> value; values are YAML, and `1e-3` is a number."""
    overrides = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise ConfigError(f"{PLACE}: {text!r}: write key=value, e.g. train.max_steps=10 (or key=null)")
        overrides[key.strip()] = parse_value(value.strip())
    return overrides


def config_overrides(config: Mapping[str, Any], site_keys: Collection[str]) -> dict[str, Any]:
    """The overrides in Snakemake's `config`: sections (`train: {max_steps: 10}`), `set` (`"train.max_steps=10 ..."`).

    Snakemake hands nested values of `--config` over as text, so texts are read as on a command line. Keys that are
    neither a section nor in `site_keys` are refused.
    """
    overrides: dict[str, Any] = {}
    problems = []
    for key, value in config.items():
        if key == "set":
            texts = value if isinstance(value, list) else shlex.split(str(value))
            overrides.update(parse_assignments(map(str, texts)))
        elif key == "runs" or key in SECTIONS:
            overrides.update(flatten(parse_value(value), key))
        elif key not in site_keys:
            near = nearest(key, [*site_keys, "set", "runs", *SECTIONS])
            problems.append(
                Problem("config.yaml or --config", key, f"unknown key{f'; did you mean {near}?' if near else ''}")
            )
    if problems:
        raise ConfigProblems(problems)
    return overrides


def override_arguments(overrides: Mapping[str, Any], run: str) -> list[str]:
    """The overrides that reach `run`'s config.json, as `key=value` texts that `parse_assignments` reads back."""
    return [
        f"{key}={json.dumps(value, ensure_ascii=False, allow_nan=False)}"
        for key, value in sorted(overrides.items())
        if (not key.startswith("runs.") or key.startswith(f"runs.{run}."))
        and "resources" not in key.removeprefix(f"runs.{run}.").split(".")[:1]
    ]


def entry_of(value: Any) -> Entry:
    """A value from the command line in the shape of one read from a file."""
    if isinstance(value, dict):
        return Entry({str(key): entry_of(item) for key, item in value.items()}, PLACE)
    return Entry(value, PLACE)
