"""Python code that ships with a model runs only where the user has said so, and nobody is asked on stdin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dayzero.errors import ConfigError, DataError
from dayzero.files import read_json


def require_trusted_code(
    directory: Path, trust_remote_code: bool, what: str = "", switch: str = "model.trust_remote_code: true"
) -> None:
    """Raise `ConfigError`, naming `what` (default: the directory) and the `switch` that allows it, where its model or
    tokenizer needs Python code of its own and `trust_remote_code` is off, or the code lies elsewhere.

    transformers itself would ask on stdin, or fetch the code from the hub.
    """
    what = what or str(directory)
    for name in ("config.json", "tokenizer_config.json"):
        code = read_object(directory / name).get("auto_map")
        if code and not trust_remote_code:
            raise ConfigError(
                f"{what}: its {name} asks to run Python code of its own (auto_map): read that code, then set "
                f"{switch}, or use a version that transformers knows"
            )
        if "--" in str(code):
            raise ConfigError(f"{what}: the code in auto_map lies in another repository: copy it beside {name}")


def read_object(file: Path) -> dict[str, Any]:
    """What a model's JSON file says; empty where there is none. Raises `DataError` where it is no JSON object."""
    if not file.is_file():
        return {}
    try:
        content = read_json(file)
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error}): fetch the model again") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: not a JSON object: fetch the model again")
    return content
