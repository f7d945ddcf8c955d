"""A mix of sources: exact shares at any time, no row lost or doubled in a pass, the same order on any ranks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dayzero.data.loader import TrainBatches
from dayzero.data.mixing import LONGEST_ORDER, Mix
from dayzero.data.tokens import FILL, TokenRows
from dayzero.errors import ConfigError
from dayzero.stages import fetch_data, tokenize, train
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import ARCHITECTURES
from tests.tiny_tokenizer import tiny_tokenizer

WEIGHTS = st.lists(st.floats(0.01, 100, allow_nan=False).map(lambda w: round(w, 2)), min_size=2, max_size=6)


def mix(weights: list[float], sizes: list[int] | None = None) -> Mix:
    return Mix(sizes or [7] * len(weights), weights, [f"source {i}" for i in range(len(weights))])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(weights=WEIGHTS, seed=st.integers(0, 2**31))
def test_every_source_has_its_share_at_any_time(weights: list[float], seed: int) -> None:
    found = mix(weights)
    total = len(found.order)
    assert total <= LONGEST_ORDER
    share = np.array(weights) / sum(weights)
    assert np.abs(found.shares / total - share).max() <= len(weights) / LONGEST_ORDER
    done = np.cumsum(found.order[:, None] == np.arange(len(weights)), axis=0)
    owed = np.arange(1, total + 1)[:, None] * found.shares / total
    assert np.abs(done - owed).max() < 1
    assert found.counts(3 * total + total // 2).tolist() == (3 * found.shares + done[total // 2 - 1]).tolist()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4), seed=st.integers(0, 2**31), data=st.data())
def test_each_pass_over_a_source_has_each_of_its_rows_once(sizes: list[int], seed: int, data: Any) -> None:
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    found = mix(weights, sizes)
    rows = found.rows(np.arange(500), seed)
    first = np.cumsum([0, *sizes])
    for source, size in enumerate(sizes):
        mine = rows[(rows >= first[source]) & (rows < first[source + 1])]
        assert len(mine) == found.counts(500)[source]
        for start in range(0, len(mine) - size + 1, size):
            assert len(set(mine[start : start + size].tolist())) == size
    some = np.random.default_rng(seed).permutation(500)[:50]
    assert found.rows(some, seed).tolist() == rows[some].tolist(), "any sample on its own"


def test_each_source_draws_its_order_once_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    found, draws, draw = mix([1, 1, 1], [40, 50, 60]), 0, np.random.default_rng

    def counted(key: list[int]) -> np.random.Generator:
        nonlocal draws
        draws += 1
        return draw(key)

    monkeypatch.setattr(np.random, "default_rng", counted)
    rows = [found.rows(np.arange(start, start + 16), seed=2) for start in range(0, 160, 16)]
    assert draws == 5, "54 samples of each: two begin a second pass"
    assert np.concatenate(rows).tolist() == mix([1, 1, 1], [40, 50, 60]).rows(np.arange(160), seed=2).tolist()


def test_exact_weights_and_passes() -> None:
    assert mix([0.7, 0.2, 0.1]).shares.tolist() == [7, 2, 1]
    assert mix([1, 1]).order.tolist() == [0, 1]
    assert mix([1, 1e-9]).shares.tolist() == [LONGEST_ORDER - 1, 1]
    assert [s["passes"] for s in mix([3, 1], [30, 2]).describe(40)] == [1.0, 5.0]
    with pytest.raises(ConfigError, match="no training row is left of source 1"):
        mix([1, 1], [3, 0])


SENTENCE = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The tokens of two sources of 90 and 30 texts, and the run's config."""
    path = tmp_path_factory.mktemp("mix")
    names = []
    for name, count in (("many", 90), ("few", 30)):
        (path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i}. {SENTENCE}"}}\n' for i in range(count)))
        names.append(str(path / f"{name}.jsonl"))
    tiny_tokenizer(path / "tokenizer")
    config = {
        "experiment": "e",
        "run": "r",
        "data": {"source": names, "weights": [0.5, 0.5], "validation_size": 4},
        "tokenize": {"seq_len": 64},
        "model": {"architecture": {**ARCHITECTURES["llama"], "vocab_size": 512}},
        "method": {"name": "pretrain"},
        "parallelism": {"strategy": "none"},
        "train": {"max_steps": 3, "global_batch_size": 4, "local_batch_size": 2, "precision": "fp32"},
    }
    text = json.dumps(config)
    assert fetch_data.main(["--config", text, "--output", str(path / "data")]) == 0
    folders = ["--data", str(path / "data"), "--tokenizer", str(path / "tokenizer")]
    assert tokenize.main(["--config", text, *folders, "--output", str(path / "tokens")]) == 0
    return path, config


def test_rows_hold_one_source_each(made: tuple[Path, dict[str, Any]]) -> None:
    path, _ = made
    rows = TokenRows(path / "tokens" / "train")
    [many, few] = json.loads((path / "tokens/manifest.json").read_text())["splits"]["train"]["sources"]
    bound = json.loads((path / "data/manifest.json").read_text())["splits"]["train"]["source_rows"][0]
    assert many["rows"] + few["rows"] == len(rows)
    assert many["tokens"] + few["tokens"] == rows.num_tokens
    assert many["documents"] == bound
    for index in range(len(rows)):
        assert {d >= bound for d in rows.source_rows(np.array([index]))} == {index >= many["rows"]}


def test_a_source_that_leaves_no_row_of_tokens_is_named_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("long", SENTENCE), ("short", "fox")):
        lines = "".join(f'{{"text": "{text} {i}"}}\n' for i in range(6))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    tiny_tokenizer(tmp_path / "tokenizer")
    config = {
        "data": {"source": [str(tmp_path / f"{n}.jsonl") for n in ("long", "short")], "validation_size": 0},
        "tokenize": {"min_label_tokens": 6},
        "by_source": True,
    }
    text = json.dumps(config)
    assert fetch_data.main(["--config", text, "--output", str(tmp_path / "data")]) == 0
    folders = ["--data", str(tmp_path / "data"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert tokenize.main(["--config", text, *folders, "--output", str(tmp_path / "tokens")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    said = f"data.source: {tmp_path}/short.jsonl: no train row is left of its 6 (dropped of all sources: 6 few_labels)"
    assert said in last
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_draws_the_mix_on_any_ranks_and_from_any_step(
    made: tuple[Path, dict[str, Any]], num_workers: int
) -> None:
    path, _ = made
    rows = TokenRows(path / "tokens" / "train")
    counts = [s["rows"] for s in json.loads((path / "tokens/manifest.json").read_text())["splits"]["train"]["sources"]]

    def steps(start: int = 0, **share: Any) -> list[list[int]]:
        batches = TrainBatches(
            rows,
            global_batch_size=8,
            local_batch_size=2,
            num_epochs=1.1,
            seed=5,
            start_step=start,
            num_workers=num_workers,
            mix=Mix(counts, [0.5, 0.5], ["many", "few"]),
            **share,
        )
        return [batch.row_ids for batch in batches]

    whole = steps()
    assert steps(dp_size=2, dp_rank=1) == whole
    assert steps(start=3) == whole[3:]
    found = TrainBatches(rows, global_batch_size=8, local_batch_size=2, num_epochs=1.1, mix=Mix(counts, [1, 1], "ab"))
    drawn = Counter(bool(r >= counts[0]) for s in range(found.num_steps) for r in found.global_batch(s) if r != FILL)
    assert abs(drawn[True] - drawn[False]) <= 1
    assert sum(drawn.values()) == found.num_samples == round(1.1 * len(rows))


def test_training_says_what_it_drew(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, config = made
    arguments = ["--tokens", str(path / "tokens"), "--tokenizer", str(path / "tokenizer"), "--output", str(tmp_path)]
    assert train.main(["--config", json.dumps(config), *arguments]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [(s["source"], s["share"], s["samples"]) for s in summary["mix"]] == [
        (source, 0.5, 6) for source in config["data"]["source"]
    ]
