"""All mistakes of a configuration at once: each with its place, key, value, what is expected and the nearest key."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from dayzero.config_keys import KEYS, expected
from dayzero.errors import ConfigError
from dayzero.strict_yaml import number_of_text

NO_VALUE = object()


@dataclass(frozen=True)
class Problem:
    """One mistake: `where: key = value: message`, and the run where it shows, if that is not plain from the place."""

    where: str
    key: str
    message: str
    value: Any = NO_VALUE
    run: str | None = None

    def __str__(self) -> str:
        value = "" if self.value is NO_VALUE else f" = {_short(self.value)}"
        return f"{self.where}: {self.key}{value}: {self.message}"


class ConfigProblems(ConfigError):
    """Every mistake that was found, one a line; what is wrong in shared settings is said once for all runs."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        runs: dict[str, list[str]] = {}
        for problem in self.problems:
            runs.setdefault(str(problem), []).extend([problem.run] if problem.run else [])
        lines = [f"  {text}{_of_runs(names)}" for text, names in runs.items()]
        head = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        super().__init__("\n".join([f"{head} in the configuration:", *lines]))


def _of_runs(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f" (run{'s' if len(names) > 1 else ''} {', '.join(names[:5])}{more})"


def unknown_key(where: str, key: str, valid: Collection[str] = (), *, hint: str = "") -> Problem:
    """A key that does not exist, with the nearest one that does (of `valid`, or of all keys of a run)."""
    near = nearest(key, valid or KEYS)
    meant = hint or (f"did you mean {near}?" if near else "see workflow/schemas for all keys")
    return Problem(where, key, f"unknown key; {meant}")


def wrong_value(where: str, key: str, value: Any, detail: str = "") -> Problem:
    """A value of the wrong type or out of its range."""
    wanted = expected(key)
    message = f"expected {wanted}" if wanted else detail
    if number := number_of_text(value):
        whole = wanted.startswith("an integer") and float(number).is_integer()
        message += f"; YAML reads {value} as text: write {int(float(number)) if whole else number}"
    elif isinstance(value, str) and _is_number(value):
        message += "; it is quoted, so it is text: leave the quotes out"
    return Problem(where, key, message, value)


def nearest(key: str, valid: Collection[str]) -> str | None:
    """The valid key most like `key`: one with the same last part, then the nearest spelling."""
    last = key.rpartition(".")[2]
    same_last = [k for k in valid if k.rpartition(".")[2] == last]
    if same_last:
        return max(same_last, key=lambda k: difflib.SequenceMatcher(None, key, k).ratio())
    if close := difflib.get_close_matches(key, valid, n=1, cutoff=0.7):
        return close[0]
    by_last = {k.rpartition(".")[2]: k for k in reversed(list(valid))}
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)
    return by_last[close[0]] if close else None


def did_you_mean(name: str, known: Collection[str], there: str = "there are") -> str:
    """The hint at a name that does not exist: the nearest one that does, or the first of them."""
    near = nearest(name, known)
    return f"did you mean {near}?" if near else f"{there} {', '.join(list(known)[:20]) or 'none'}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
