"""What a user did wrong, said so that it can be put right."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configured value cannot be used. The message names the field, its value and the remedy, in one line."""


class DataError(ValueError):
    """A file or row cannot be used. The message names the file (and row) and the remedy, in one line."""
