"""Nested mappings as flat ones."""

from __future__ import annotations

from typing import Any


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted key below `key` -> value that is no mapping; an empty mapping stands for itself."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {
        k: v for name, below in value.items() for k, v in flatten(below, f"{key}.{name}" if key else str(name)).items()
    }
