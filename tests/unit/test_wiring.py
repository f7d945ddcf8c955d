"""What each job reads, and what it is told of the config."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dayzero import store
from dayzero.config import RunConfig
from dayzero.errors import ConfigError
from dayzero.experiment import Experiment
from dayzero.snakemake_resources import by_run
from dayzero.wiring import Wiring

LLAMA = {"model_type": "llama"}


def wiring(**runs: dict[str, Any]) -> Wiring:
    """An experiment of runs given as nested settings."""
    shared = {"experiment": "exp", "data": {"source": "hf:org/rows"}, "train": {"max_steps": 1}}
    made = {name: RunConfig.model_validate({**shared, "run": name, **run}) for name, run in runs.items()}
    return Wiring(Experiment("exp", "", made), "results")


@pytest.mark.parametrize(
    ("method", "model", "options"),
    [
        ("lora", {"source": "hf:org/m"}, ["--model"]),
        ("none", {"source": "hf:org/m"}, ["--model"]),
        ("pretrain", {"source": "hf:org/m"}, ["--model"]),
        ("pretrain", {"source": "hf:org/m", "tokenizer": {}}, ["--model", "--tokenizer"]),
        ("pretrain", {"architecture": LLAMA, "tokenizer": {}}, ["--tokenizer"]),
        ("pretrain", {"architecture": LLAMA, "source": "hf:org/m"}, ["--tokenizer"]),
    ],
)
def test_where_a_run_starts_from(method: str, model: dict[str, Any], options: list[str]) -> None:
    it = wiring(a={"method": {"name": method}, "model": model})
    arguments = it.start_arguments("a")
    assert arguments[::2] == options
    assert it.start("a") == [f"{directory}/manifest.json" for directory in arguments[1::2]]
    run = it.run("a")
    tokenizer = f"tokenizers/{store.tokenizer_key(run)}" if "tokenizer" in model else f"models/{store.model_key(run)}"
    assert arguments[-1] == f"results/store/{tokenizer}" == it.tokenizer(run)
    assert it.trained("a") == ([] if method == "none" else ["results/exp/a/train/summary.json"])


def test_runs_share_the_store() -> None:
    model = {"source": "hf:org/m"}
    it = wiring(a={"model": model}, b={"model": model, "seed": 1}, c={"model": {"source": "hf:org/n"}})
    assert it.tokens(it.run("a")) == it.tokens(it.run("b")) != it.tokens(it.run("c"))
    assert it.data(it.run("a")) == it.data(it.run("c"))
    assert len(it.results("store")) == 5  # data; tokens and model of m; those of n


def test_a_rule_is_given_a_value_where_runs_differ_by_their_names_alone() -> None:
    model = {"source": "hf:org/m"}
    same = wiring(train={"model": model}, b={"model": model, "seed": 1})  # a run may be named as a folder is
    assert by_run(same, same.tokens_manifest) == same.tokens_manifest("b")
    assert by_run(same, same.trained) == ["results/exp/{run}/train/summary.json"]
    assert by_run(same, same.trained_arguments) == ["--train", "results/exp/{run}/train"]
    mixed = wiring(a={"model": model}, b={"model": model, "method": {"name": "none"}}, c={"model": {"source": "hf:n"}})
    for function in (mixed.trained, mixed.start, mixed.tokens_manifest):
        asked = by_run(mixed, function)
        assert [asked(SimpleNamespace(run=name)) for name in "abc"] == [function(name) for name in "abc"]
    braces = wiring(a={"model": {**model, "chat_template": "{run}.jinja"}})  # a file's name, no pattern
    assert by_run(braces, braces.chat_template_of_run)(SimpleNamespace(run="a")) == ["{run}.jinja"]


def test_a_stage_s_config_is_whole_but_for_what_it_must_not_read() -> None:
    it = wiring(
        a={"model": {"source": "hf:org/m"}, "seed": 5}, b={"method": {"name": "full"}, "model": {"source": "m"}}
    )
    text = it.config("a", "train")
    run = RunConfig.model_validate_json(text)
    assert (run.seed, run.train.max_steps, run.model.source) == (5, 1, "hf:org/m")
    assert {"evaluate", "serving", "export", "resources"}.isdisjoint(json.loads(text))
    assert json.loads(it.config("b", "train"))["method"] == {"name": "full"}  # LoRA's settings are none of its business
    assert json.loads(it.config("a", "evaluate")).keys() == {"evaluate"}


def test_untouched_models_do_not_depend_on_training() -> None:
    model = {"source": "hf:org/m"}
    none = {"method": {"name": "none"}, "model": model}
    it = wiring(a=none, b={**none, "train": {"max_steps": 7}, "data": {"source": "hf:org/others"}})
    a, b = (json.loads(it.config(name, "export")) for name in "ab")
    assert {**a, "run": "b"} == b


def test_results_of_runs_that_skip_stages() -> None:
    it = wiring(a={"method": {"name": "none"}, "evaluate": {"tasks": ["x"]}}, b={})
    assert it.results("train") == ["results/exp/b/train/metrics.jsonl", "results/exp/b/train/summary.json"]
    assert it.results("evaluate") == ["results/exp/a/eval/results.json"]
    assert len(it.results("verify_serving")) == 2


def test_a_teacher_is_a_run_s_export_or_a_model_of_the_store() -> None:
    model = {"source": "hf:org/m"}
    kd = {"name": "kd", "kd": {"teacher": "a"}}
    of_model = {"name": "kd", "kd": {"teacher": "hf:org/big"}}
    it = wiring(a={"model": model}, b={"model": model, "method": kd}, c={"model": model, "method": of_model})
    assert it.teacher("a") == it.teacher_arguments("a") == []
    assert it.teacher("b") == ["results/exp/a/model/manifest.json"]
    assert it.teacher_arguments("b") == ["--teacher", "results/exp/a/model"]
    (manifest,) = it.teacher("c")
    key = manifest.split("/")[-2]
    assert manifest == f"results/store/models/{key}/manifest.json"
    assert json.loads(it.spec("models", key))["model"]["source"] == "hf:org/big"
    assert it.model(it.run("c")) == it.model(it.run("a"))
    it.check_local_files()


def test_a_teacher_that_is_nowhere_or_the_run_itself() -> None:
    model = {"source": "hf:org/m"}

    def kd(teacher: str) -> dict[str, Any]:
        return {"model": model, "method": {"name": "kd", "kd": {"teacher": teacher}}}

    with pytest.raises(
        ConfigError, match=r"teacher = 'lorra': no run of this experiment and no such file.*lora\? \(run b\)"
    ):
        wiring(lora={"model": model}, b=kd("lorra")).check_local_files()
    with pytest.raises(ConfigError, match=r"learns from itself: a <- b <- a: name another run"):
        wiring(a=kd("b"), b=kd("a")).check_local_files()


def test_resources_come_from_the_run_or_the_first_that_uses_the_key() -> None:
    it = wiring(a={"resources": {"train": {"gpu": 4}, "fetch": {"mem_mb": 9}}}, b={})
    assert it.resources("train", SimpleNamespace(run="a")).gpu == 4
    assert it.resources("train", SimpleNamespace(run="b")).gpu == 0
    assert it.resources("fetch", SimpleNamespace(key=store.data_key(it.run("b")))).mem_mb == 9
    assert it.resources("report", SimpleNamespace()).threads == 1


def test_unknown_names_are_said_in_words() -> None:
    it = wiring(lora={})
    with pytest.raises(ConfigError, match=r"results/exp has no run lorra; did you mean lora\?"):
        it.run("lorra")
    with pytest.raises(ConfigError, match="no run of results/exp uses x-1"):
        it.spec("data", "x-1")


def test_local_files(tmp_path: Path) -> None:
    (tmp_path / "model/sub").mkdir(parents=True)
    files = [tmp_path / "model/config.json", tmp_path / "model/sub/x.json", tmp_path / "rows.jsonl"]
    for file in files:
        file.touch()
    (tmp_path / "model/.hidden").touch()
    data = {"source": ["hf:org/rows", str(files[2])], "answers": str(tmp_path / "none.json")}
    it = wiring(a={"model": {"source": str(tmp_path / "model")}, "data": data})
    run = it.run("a")
    assert it.local_model(store.model_key(run)) == [str(file) for file in files[:2]]
    assert it.local_data(store.data_key(run)) == [str(files[2]), str(tmp_path / "none.json")]
    with pytest.raises(ConfigError, match=r"data\.answers = '.*none\.json': no such file or directory"):
        it.check_local_files()


def test_local_files_of_a_glob_and_of_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        Path(file).touch()
    for source in ("~/*.jsonl", str(tmp_path / "*.jsonl"), ["~/a.jsonl", "~/b.jsonl"]):
        it = wiring(a={"model": {"source": "hf:org/m"}, "data": {"source": source}})
        assert it.local_data(store.data_key(it.run("a"))) == files
        it.check_local_files()
    for source in ("~/*.csv", "~/c.jsonl"):
        with pytest.raises(ConfigError, match="no such file or directory"):
            wiring(a={"data": {"source": source}}).check_local_files()


def test_a_chat_template_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").touch()
    wiring(a={"model": {"source": "hf:org/m", "chat_template": str(tmp_path / "t.jinja")}}).check_local_files()
    with pytest.raises(ConfigError, match=r"model\.chat_template = 'hf:org/m': no such file"):
        wiring(a={"model": {"source": "hf:org/m", "chat_template": "hf:org/m"}}).check_local_files()
