"""Ten architectures of different kinds through every check, in one launch; `make coverage` walks them all."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from dayzero.errors import ConfigError

from tests.coverage import table, walk
from tests.coverage.blame import blame
from tests.coverage.checks import CHECKS, Subject, explain

pytestmark = pytest.mark.distributed

TEN = {
    "gpt2": "transposed linears, learned positions, a tied head",
    "falcon": "one matrix for query, key and value; one key head",
    "qwen3_moe": "a mixture of experts, grouped queries, norms of heads",
    "mamba": "state spaces",
    "jamba": "state spaces, attention and experts in turn",
    "gemma2": "sliding windows, capped logits",
    "gpt_oss": "a mask for each kind of layer, sinks, experts with biases",
    "granite": "scaled logits and residuals",
    "zamba": "layers that share their weights",
    "ernie4_5_moe": "parameters that its constructor freezes",
}

NO_SPLIT = {"gpt2", "falcon", "mamba", "jamba", "gpt_oss", "zamba"}
"""Those that tensor parallelism is refused for."""

SHARED_ROWS = {"falcon", "mamba", "jamba", "gpt_oss", "zamba"}
"""Those whose documents would see one another in a row."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> table.Results:
    folder = tmp_path_factory.mktemp("coverage")
    walk.walk(folder, list(TEN), "", time.monotonic() + 600)
    return {name: walk.read(folder, name)["cells"] for name in TEN}


@pytest.mark.parametrize("name", TEN)
def test_every_check_passes(results: table.Results, name: str) -> None:
    wrong = {check: cell for check, cell in results[name].items() if cell["status"] != "pass"}
    if name in NO_SPLIT:
        assert wrong.pop("tp")["status"] == "refused"
    assert not wrong
    assert set(results[name]) == set(table.COLUMNS)
    assert table.state(results[name]["packing"]) == ("padded" if name in SHARED_ROWS else "pass")


def test_nothing_is_worse_than_the_table_says(results: table.Results) -> None:
    baseline = json.loads(walk.TWIN.read_text())["architectures"]
    assert not table.worse(results, {name: baseline[name] for name in TEN})


def test_the_page_is_that_of_its_twin() -> None:
    """Both are written by one command; the shares are counted from the cells."""
    twin = json.loads(walk.TWIN.read_text())
    good, total = table.share(twin["architectures"], table.CORE)
    assert good >= 0.97 * total
    assert f"**{good} of {total} ({100 * good / total:.1f} %) pass" in walk.PAGE.read_text()
    assert not any("SILENT LEAK" in cells["packing"]["why"] for cells in twin["architectures"].values())


PASS, PADDED = {"status": "pass", "why": ""}, {"status": "pass", "why": "padded: leaks 0.1"}
FAIL = {"status": "fail", "why": "it broke"}


def test_what_passed_and_does_not_any_more_is_worse() -> None:
    before = {"a": {"full": PASS, "packing": PASS, "tp": FAIL}, "b": {"packing": PADDED}}
    assert table.worse(before, before) == []
    assert table.worse({"a": {"full": PASS, "packing": PADDED, "tp": FAIL}, "b": {"packing": PASS}}, before) == [
        "a, packing: pass before, now padded: padded: leaks 0.1"
    ]
    b = {"b": before["b"]}
    assert table.worse({"a": {"full": FAIL, "packing": PASS, "tp": FAIL}, **b}, before) == [
        "a, full: pass before, now fail: it broke"
    ]
    assert table.worse({"a": {"packing": PASS}, **b}, before) == ["a, full: pass before, now missing: "]
    assert table.worse(b, before) == ["a: in the table before, not tried now"]


def test_what_transformers_alone_cannot_do_is_not_the_engines_failure(tmp_path: Path) -> None:
    subject = Subject("llama", tmp_path / "llama")
    subject.make()
    assert [blame(check, subject) for check in CHECKS] == [""] * len(CHECKS)
    (subject.directory / "model.safetensors").unlink()
    for check in CHECKS:
        assert blame(check, subject).startswith("transformers alone: OSError: "), check


def test_a_reason_for_users_keeps_its_remedy() -> None:
    assert explain(ConfigError(f"{'x' * 400}: use dp_shard")).endswith("x: use dp_shard")


def test_what_takes_the_ranks_down_is_the_running_checks_failure(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"cells": {"full": PASS}, "seconds": 2.0, "running": "lora"}))
    (tmp_path / "ranks.log").write_text("a line\nRuntimeError: abort\n")
    walk.note_death(tmp_path, "a", "the ranks ended with status -6", tmp_path / "ranks.log", "")
    found = walk.read(tmp_path, "a")
    assert found["cells"] == {
        "full": PASS,
        "lora": {"status": "fail", "why": "the ranks ended with status -6 RuntimeError: abort"},
    }
    assert not found["done"]  # its other checks are still to be run
    walk.note_death(tmp_path, "b", "nothing came back within 150 s", tmp_path / "ranks.log", "")
    assert walk.read(tmp_path, "b")["done"]  # not even a model: nothing else can be asked
