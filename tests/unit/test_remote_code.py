"""A model with Python code of its own: every stage refuses it in one line unless the user trusts it, and never asks."""

from __future__ import annotations

import builtins
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dayzero.config import Model, RunConfig
from dayzero.data.tokenizer import check_same_tokens
from dayzero.engine.model import ModelSource
from dayzero.errors import ConfigError
from dayzero.files import canonical_json
from dayzero.stages import serve
from dayzero.store import STAGE_SECTIONS, model_spec, stage_config, tokens_spec

from tests.own_code import own_code_model

ROOT = Path(__file__).parents[2]
ROWS = [{"text": f"The quick brown fox number {i} jumps over the lazy dog."} for i in range(8)]
REFUSED = "its config.json asks to run Python code of its own (auto_map): read that code, then set "


def config(folder: Path, *, trust: bool, method: str = "full") -> RunConfig:
    """A run of the model with code on a few rows."""
    values: dict[str, Any] = {
        "experiment": "e",
        "run": "r",
        "model": {"source": str(folder / "source"), "trust_remote_code": trust},
        "data": {"source": str(folder / "rows.jsonl"), "validation_size": 0, "test_size": 2},
        "tokenize": {"seq_len": 32},
        "method": {"name": method},
        "train": {"max_steps": 1, "global_batch_size": 1, "local_batch_size": 1},
        "evaluate": {"tasks": ["text_perplexity"], "limit": 2},
        "serving": {"num_prompts": 2, "max_new_tokens": 2},
    }
    return RunConfig.model_validate(values)


def call(stage: str, run: RunConfig, folder: Path, model: Path, output: Path, *more: str) -> int:
    """A stage, given what the workflow gives it of the run's config."""
    text = canonical_json(stage_config(run, stage) if stage in STAGE_SECTIONS else tokens_spec(run))
    data, tokens = ["--data", str(folder / "data")], ["--tokens", str(folder / "tokens")]
    arguments: dict[str, list[str]] = {
        "fetch_data": [],
        "fetch_model": [],
        "tokenize": [*data, "--tokenizer", str(model)],
        "train": [*tokens, "--model", str(model)],
        "export": ["--model", str(model)],
        "evaluate": [*data, "--model", str(model), "--tasks-dir", str(ROOT / "config/tasks")],
        "verify_serving": [*tokens, "--model", str(model)],
    }
    main = importlib.import_module(f"dayzero.stages.{stage}").main
    return int(main(["--config", text, *arguments[stage], *more, "--output", str(output)]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """source/ with the model, rows, data/ and tokens/; the copies that transformers makes of code go here too."""
    path = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWN_CODE_RAN", str(path / "ran"))
        patch.setenv("HF_MODULES_CACHE", str(path / "modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(path / "modules"))
        patch.syspath_prepend(path / "modules")
        own_code_model(path / "source")
        (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        run = config(path, trust=True)
        for stage, output in (("fetch_data", "data"), ("tokenize", "tokens")):
            assert call(stage, run, path, path / "source", path / output) == 0
        yield path


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*said: object) -> str:
        raise AssertionError(f"asked on stdin: {said}")

    monkeypatch.setattr(builtins, "input", ask)


@pytest.mark.parametrize("stage", ["fetch_model", "tokenize", "train", "export", "evaluate", "verify_serving"])
def test_every_stage_refuses_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str) -> None:
    (folder / "ran").unlink(missing_ok=True)
    run = config(folder, trust=False, method="none" if stage == "export" else "full")
    assert call(stage, run, folder, folder / "source", tmp_path / "out") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"{stage}: error: ")
    assert f"{folder / 'source'}: {REFUSED}model.trust_remote_code: true" in last
    assert not (folder / "ran").exists()


def test_the_server_refuses_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "ran").unlink(missing_ok=True)
    assert serve.main(["--model", str(folder / "source")]) == 1
    assert f"{REFUSED}--trust-remote-code" in capsys.readouterr().err
    assert not (folder / "ran").exists()


def test_code_of_a_tokenizer_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}}))
    said = r"its tokenizer_config\.json asks to run Python code"
    with pytest.raises(ConfigError, match=said):
        ModelSource(directory=None, architecture={"model_type": "llama"}).config(tmp_path)
    with pytest.raises(ConfigError, match=f"method.kd.teacher t: .*{said}"):
        check_same_tokens(folder / "source", tmp_path, "t", trust_remote_code=False)


def test_trusted_from_the_source_to_the_scores(folder: Path, tmp_path: Path) -> None:
    run = config(folder, trust=True)
    store, train, model, scores = (tmp_path / name for name in ("store", "train", "model", "eval"))
    assert call("fetch_model", run, folder, folder / "source", store) == 0
    assert call("train", run, folder, store, train) == 0
    assert call("export", run, folder, store, model, "--train", str(train)) == 0
    assert (model / "own_model.py").is_file()
    assert call("evaluate", run, folder, model, scores) == 0
    assert json.loads((scores / "results.json").read_text())["tasks"]["text_perplexity"]["num_items"] == 2
    check_same_tokens(store, model, "t", trust_remote_code=True)


@pytest.mark.full  # starting vLLM takes a minute
@pytest.mark.end_to_end
def test_trusted_by_vllm(folder: Path, tmp_path: Path) -> None:
    run, store, model = config(folder, trust=True, method="none"), tmp_path / "store", tmp_path / "model"
    assert call("fetch_model", run, folder, folder / "source", store) == 0
    assert call("export", run, folder, store, model) == 0
    assert call("verify_serving", run, folder, model, tmp_path / "serve") == 0
    assert json.loads((tmp_path / "serve/parity.json").read_text())["verdict"] == "pass"


def test_the_server_hands_it_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def start(command: list[str], **_: Any) -> None:
        started.append(command)
        raise OSError("not now")

    monkeypatch.setattr("dayzero.serving.server.subprocess.Popen", start)
    monkeypatch.setattr("dayzero.serving.server._require_free", lambda *_: None)
    assert serve.main(["--model", str(folder / "source"), "--trust-remote-code"]) == 1
    assert "--trust-remote-code" in started[0]


def test_only_what_is_trusted_is_told(folder: Path) -> None:
    """So a run without such code has the jobs and keys that it had."""
    off, on = config(folder, trust=False), config(folder, trust=True)
    told = {"model": {"trust_remote_code": True}}
    for stage in ("evaluate", "verify_serving"):
        section = STAGE_SECTIONS[stage][0]
        assert stage_config(off, stage) == {section: off.resolved()[section]}
        assert stage_config(on, stage) == {section: off.resolved()[section], **told}
    for stage in ("train", "export"):
        assert stage_config(on, stage)["model"]["trust_remote_code"] is True
    for spec in (model_spec(on), tokens_spec(on)):
        assert Model.model_validate(spec["model"]).trust_remote_code
