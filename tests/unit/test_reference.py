"""The documentation of the keys is the schema's."""

from __future__ import annotations

from pathlib import Path

from dayzero.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_in_sync_with_the_schema() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python -m dayzero.reference docs/configuration.md"


def test_every_leaf_key_has_a_row_and_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    keys = [row.split("`")[1] for row in rows]
    assert "train.optimizer.lr" in keys
    assert "resources.STAGE.mem_mb" in keys
    assert len(keys) == len(set(keys))
