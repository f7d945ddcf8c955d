"""The order of the tests: what takes longest first, so that `make test`'s workers end together."""

from __future__ import annotations

import pytest

LONGEST = (
    "tests/distributed/test_parity.py",
    "tests/workflow/test_end_to_end.py",
    "tests/distributed/test_resume.py",
    "tests/coverage/test_ten.py",
    "tests/workflow/test_reruns.py",
    "tests/workflow/test_snakemake.py",
    "tests/unit/test_serving.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """LONGEST in that order, then all others in theirs."""
    places = {file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.location[0], len(places)))
