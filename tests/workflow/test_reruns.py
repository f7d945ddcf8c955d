"""The rerun table: each row changes one thing and says exactly which jobs run."""

from __future__ import annotations

import os

import pytest

from tests.workflow.project import TINY, Jobs, Project, make_project

pytestmark = pytest.mark.workflow

RUNS = ("base", "low", "high")
TRAINED = ("low", "high")


def jobs(*rules: str, runs: tuple[str, ...] = RUNS) -> Jobs:
    """Each rule for each of the runs."""
    return {f"{rule}:{run}" for rule in rules for run in runs}


ALL_OF_A_RUN = ("resolve_config", "train", "export", "evaluate", "verify_serving")
AFTER_TOKENS = {"tokenize", "report"} | jobs("train", "export", runs=TRAINED) | jobs("evaluate", "verify_serving")
AFTER_DATA = AFTER_TOKENS | {"check_data"}

SETTINGS: dict[str, tuple[str, Jobs]] = {
    "nothing": ("", set()),
    "the tasks": ("evaluate.tasks=[other]", jobs("resolve_config", "evaluate") | {"check_data", "report"}),
    "one run's learning rate": ("runs.low.train.optimizer.lr=2e-3", jobs(*ALL_OF_A_RUN, runs=("low",)) | {"report"}),
    "one run's seed": ("runs.high.seed=7", jobs(*ALL_OF_A_RUN, runs=("high",)) | {"report"}),
    "one run's exported dtype": (
        "runs.low.export.dtype=bfloat16",
        jobs("resolve_config", "export", "evaluate", "verify_serving", runs=("low",)) | {"report"},
    ),
    "machine settings": (
        "resources.train.mem_mb=9000 resources.evaluate.threads=1 runs.low.resources.train.gpu=1",
        set(),
    ),
    "the serving tolerance": ("serving.tolerance=1e-2", jobs("resolve_config", "verify_serving") | {"report"}),
    "the allowed contamination": (
        "data_check.max_contamination=0.5",
        jobs("resolve_config") | {"check_data", "report"},
    ),
    "the split's seed": ("data.split_seed=1", {"fetch_data"} | AFTER_DATA | jobs("resolve_config")),
    "what happens to bad rows": ("data.on_bad_row=reject", {"fetch_data"} | AFTER_DATA | jobs("resolve_config")),
    "the sources' weights": (
        "data.weights=[1,2]",
        {"report"} | jobs("resolve_config") | jobs("train", "export", "evaluate", "verify_serving", runs=TRAINED),
    ),
    "sources without weights": (
        "data.weights=null",
        {"tokenize", "report"}
        | jobs("resolve_config", "verify_serving")
        | jobs("train", "export", "evaluate", runs=TRAINED),
    ),
    "what is supervised": (
        "tokenize.loss_turns=last",
        {"tokenize", "report"}
        | jobs("resolve_config", "verify_serving")
        | jobs("train", "export", "evaluate", runs=TRAINED),
    ),
    "the row length": (
        "tokenize.seq_len=512",
        {"tokenize", "report"}
        | jobs("resolve_config", "verify_serving")
        | jobs("train", "export", "evaluate", runs=TRAINED),
    ),
    "the model's dtype": (
        "model.dtype=float32",
        {"fetch_model", "tokenize", "report"}
        | jobs("resolve_config", "export", "evaluate", "verify_serving")
        | jobs("train", runs=TRAINED),
    ),
}

OUTPUTS: dict[str, Jobs] = {
    "store/data": {"fetch_data"} | AFTER_DATA,
    "store/models": {"fetch_model"} | AFTER_TOKENS | {"export:base"},
    "store/checks": {"check_data", "report"},
    "store/tokens": AFTER_TOKENS - {"evaluate:base"},
    "tiny/low/config.json": {"resolve_config:low", "report"},
    "tiny/low/train/summary.json": jobs("train", "export", "evaluate", "verify_serving", runs=("low",)) | {"report"},
    "tiny/low/train/metrics.jsonl": jobs("train", "export", "evaluate", "verify_serving", runs=("low",)) | {"report"},
    "tiny/low/model/manifest.json": jobs("export", "evaluate", "verify_serving", runs=("low",)) | {"report"},
    "tiny/low/eval/results.json": {"evaluate:low", "report"},
    "tiny/low/serve/parity.json": {"verify_serving:low", "report"},
    "tiny/report/results.csv": {"report"},
}

FILES: dict[str, tuple[str, str, Jobs]] = {
    "a row more": (
        "config/experiments/tiny.yaml",
        TINY + "  more: {method.lora.rank: 4}\n",
        jobs(*ALL_OF_A_RUN, runs=("more",)) | {"report"},
    ),
    "a row less": ("config/experiments/tiny.yaml", TINY[: TINY.index("  high")], {"report"}),
    "the description": ("config/experiments/tiny.yaml", TINY.replace("small", "little"), {"report"}),
    "a data file": ("local/rows.jsonl", '{"text": "b"}\n', {"fetch_data"} | AFTER_DATA),
    "a data file's time": ("local/rows.jsonl", '{"text": "a"}\n', set()),
    "a model file": ("local/model/config.json", "{ }\n", {"fetch_model"} | AFTER_TOKENS | {"export:base"}),
    "a task": ("config/tasks/exact.yaml", "task: exact\nversion: 2\n", jobs("evaluate") | {"check_data", "report"}),
    "a task that no run uses": ("config/tasks/other.yaml", "task: other\nversion: 2\n", set()),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with everything made (by stand-ins)."""
    project = make_project(tmp_path_factory.mktemp("reruns"))
    project.run("--cores", "2")
    return project


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(done: Project, name: str) -> None:
    text, expected = SETTINGS[name]
    assert done.planned(*(["--config", f"set={text}"] if text else [])) == expected


@pytest.mark.parametrize("name", OUTPUTS)
def test_deleted_output(done: Project, name: str) -> None:
    path = f"results/{name}"
    if name.startswith("store/"):
        path = str((done.store(name.removeprefix("store/")) / "manifest.json").relative_to(done.path))
    with done.without(path):
        assert done.planned() == OUTPUTS[name]


@pytest.mark.parametrize("name", FILES)
def test_edited_file(done: Project, name: str) -> None:
    path, text, expected = FILES[name]
    with done.edited(path, text):
        assert done.planned() == expected


def test_second_experiment_shares_the_store(done: Project) -> None:
    (done.path / "config/experiments/second.yaml").write_text(TINY)
    second = ["--config", "experiment=second"]
    before = {path: path.stat().st_mtime_ns for path in done.path.glob("results/store/*/*/manifest.json")}
    own = jobs("resolve_config", "export", "evaluate", "verify_serving") | jobs("train", runs=TRAINED) | {"report"}
    assert done.planned(*second) == own
    done.run("--cores", "2", *second)
    assert before == {path: path.stat().st_mtime_ns for path in done.path.glob("results/store/*/*/manifest.json")}
    assert done.planned(*second) == set()
    assert done.planned() == set()


def test_rerun_settles(done: Project) -> None:
    """What a change reruns is done for good, and the other runs' files are not touched."""
    low = ["--config", "set=runs.low.train.optimizer.lr=2e-3"]
    high = done.path / "results/tiny/high/train/summary.json"
    before = os.stat(high).st_mtime_ns
    done.run("--cores", "2", *low)
    assert os.stat(high).st_mtime_ns == before
    assert done.planned(*low) == set()
    assert '"lr": 0.002' in (done.path / "results/tiny/low/config.json").read_text()
    done.run("--cores", "2")  # back, for the tests that share this project
    assert done.planned() == set()
