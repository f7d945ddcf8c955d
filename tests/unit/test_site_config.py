"""What acts beside Snakemake (inspect, serve, status, the check of an experiment) obeys config/config.yaml too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dayzero import experiment, status
from dayzero.errors import ConfigError
from dayzero.experiment import load_experiment
from dayzero.site_config import load
from dayzero.stages import inspect_rows, serve
from dayzero.wiring import Wiring

EXPERIMENT = """
defaults: {data.source: rows.jsonl, model.source: model, train.max_steps: 1}
runs: {lora: {}, other: {seed: 3}}
"""
CONFIG = """
experiment: mine.yaml
results_dir: disk/out/
set: [train.max_steps=7]
tokenize: {seq_len: 32}
runs: {lora: {seed: 5}}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config.yaml that sets something, and two experiments."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text(CONFIG)
    for name in ("mine", "yours"):
        (tmp_path / f"{name}.yaml").write_text(EXPERIMENT)
    return tmp_path


def test_the_experiment_with_the_site_s_settings(here: Path) -> None:
    made, results = load()
    assert (made.name, results) == ("mine", "disk/out")
    lora = made.runs["lora"]
    assert (lora.tokenize.seq_len, lora.train.max_steps, lora.seed) == (32, 7, 5)
    assert load("./yours.yaml", {"train.max_steps": 2})[0].runs["lora"].train.max_steps == 2
    assert load("./yours.yaml")[0].name == "yours"


def test_the_commands_name_what_snakemake_makes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"tokenize.seq_len": 32, "train.max_steps": 7, "runs.lora.seed": 5}
    wiring = Wiring(load_experiment("mine.yaml", said), "disk/out")
    for main, arguments, printed in (
        (inspect_rows.main, ["--run", "lora", "--print-target"], wiring.tokens_manifest("lora")),
        (serve.main, ["--run", "lora", "--print-target"], "disk/out/mine/lora/model/manifest.json"),
        (
            serve.main,
            ["--experiment", "yours.yaml", "--run", "other", "--print-target"],
            "disk/out/yours/other/model/manifest.json",
        ),
        (experiment.main, ["--print-folder"], "disk/out/mine"),
        (experiment.main, [], "lora\nother"),
    ):
        assert main(arguments) == 0
        assert capsys.readouterr().out == f"{printed}\n"


def test_status_looks_where_snakemake_writes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stages() -> list[tuple[str, int | None]]:
        assert status.main(["--once", "--json"]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return [(row["stage"], row["total"]) for row in rows]

    def write(file: Path) -> None:
        file.parent.mkdir(parents=True)
        file.write_text("{}")

    assert stages() == [("fetch_data", None)] * 2
    wiring = Wiring(*load())
    run = wiring.run("lora")
    for folder in (wiring.data(run), wiring.tokenizer(run), wiring.tokens(run)):
        write(here / folder / "manifest.json")
    write(here / "disk/out/mine/lora/train/summary.json")
    assert stages() == [("export", None), ("train", 7)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"^config/config.yaml: no such file in .*: go to the folder of the Snakefile$"),
        ("a: [", "^config/config.yaml: Config file is not valid JSON or YAML"),
        ("experiment: mine.yaml", "^config/config.yaml: results_dir is not set"),
        ("results_dir: out\nexperiment:", "^config/config.yaml: experiment is not set"),
        ("experiment: mine.yaml\nresults_dir: out\ntrian: {}", "trian: unknown key; did you mean train"),
    ],
)
def test_mistakes(here: Path, capsys: pytest.CaptureFixture[str], text: str | None, said: str) -> None:
    file = here / "config/config.yaml"
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load()
    assert status.main(["--once"]) == 1
    assert inspect_rows.main(["--run", "lora", "--print-target"]) == 1
    assert serve.main(["--run", "lora", "--print-target"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) <= 4  # one each, and a heading where several can be found


def test_what_goes_with_a_run_and_what_with_a_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--model", "x", "--experiment", "mine.yaml"], "--experiment and --print-target go with --run"),
        (["--run", "lora", "--trust-remote-code"], "set model.trust_remote_code of the run"),
        (["--run", "lara"], "did you mean lora?"),
    ):
        assert serve.main(arguments) == 1
        assert said in capsys.readouterr().err
