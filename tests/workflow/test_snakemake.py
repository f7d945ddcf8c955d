"""What a user types at Snakemake: dry runs, lint, profiles, single stages, the report, and mistakes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dayzero.reporting.plots import PLOTS

from tests.workflow.project import ROOT, STAND_IN, TINY, Project, make_project

pytestmark = pytest.mark.workflow


def typed(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it, in a process of its own and without stand-ins."""
    return subprocess.run(
        [sys.executable, "-m", "snakemake", *arguments],
        cwd=project.path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The workflow as it is shipped."""
    return make_project(tmp_path_factory.mktemp("shipped"), experiment=None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The tiny experiment, nothing made."""
    return make_project(tmp_path_factory.mktemp("tiny"))


def test_default_experiment(shipped: Project) -> None:
    of_a_run = {
        f"{rule}:{run}"
        for rule in ("resolve_config", "export", "evaluate", "verify_serving")
        for run in ("base", "lora")
    }
    once = {"fetch_data", "fetch_model", "check_data", "tokenize", "train:lora", "report"}
    assert shipped.planned() == once | of_a_run
    assert not (shipped.path / "results").exists()


def test_methods_experiment(shipped: Project) -> None:
    jobs = shipped.planned("--config", "experiment=methods")
    assert {"train:lora", "train:full", "train:pretrain", "train_tokenizer"} <= jobs
    assert "train:base" not in jobs


def test_lint_is_clean(shipped: Project) -> None:
    done = typed(shipped, "--lint")
    assert done.returncode == 0, done.stdout
    assert "in a good condition" in done.stdout


def test_slurm_profile_from_the_root(shipped: Project) -> None:
    done = typed(shipped, "--profile", "slurm", "--dry-run")
    assert done.returncode == 0, done.stdout
    assert "rule train:" in done.stdout
    assert "mem_mb=6000" in done.stdout
    assert (ROOT / "slurm/config.yaml").samefile(ROOT / "profiles/slurm/config.yaml")


def test_single_stage_by_file_name(tiny: Project) -> None:
    assert tiny.planned("results/tiny/low/train/summary.json") == {"fetch_data", "fetch_model", "tokenize", "train:low"}
    unknown = tiny.snakemake("-n", "results/tiny/lo/train/summary.json")
    assert unknown.returncode != 0
    assert "results/tiny has no run lo; did you mean low?" in unknown.stdout


def test_what_make_asks_for_is_what_snakemake_makes(tiny: Project) -> None:
    config = (tiny.path / "config/config.yaml").read_text().replace("results_dir: results", "results_dir: disk/out")
    with tiny.edited("config/config.yaml", f"{config}tokenize: {{seq_len: 64}}\n"):
        for stage, rule in (("inspect_rows", "tokenize"), ("serve", "export:low")):
            command = [sys.executable, "-m", f"dayzero.stages.{stage}", "--run", "low", "--print-target"]
            target = subprocess.run(command, cwd=tiny.path, text=True, capture_output=True, check=True).stdout.strip()
            assert target.startswith("disk/out/")
            assert rule in tiny.planned(target)


def test_a_glob_names_the_files_that_it_matches(tiny: Project) -> None:
    printed = tiny.run("-n", "--config", "set=data.source=local/*.jsonl data.weights=null")
    (inputs,) = re.findall(r"rule fetch_data:\n    input: (.*)", printed)
    assert set(inputs.split(", ")) == {"local/rows.jsonl", "local/more.jsonl"}


def test_an_experiment_needs_no_description(tiny: Project) -> None:
    """Nor is one that begins with a dash an option of the stage's."""
    for description, words in (("", "description="), ("-r 4", "description='-r 4'")):
        text = TINY.replace("description: small stand-ins", f"description: {description!r}")
        with tiny.edited("config/experiments/tiny.yaml", text):
            assert f" --{words} --runs " in tiny.run("-n", "--printshellcmds")


def test_command_line_overrides(tiny: Project) -> None:
    texts = ["set=train.optimizer.lr=1e-3 runs.low.seed=3", "train={max_steps: 10}"]
    tiny.run("--cores", "1", "results/tiny/low/config.json", "results/tiny/high/config.json", "--config", *texts)
    low, high = ((tiny.path / f"results/tiny/{run}/config.json").read_text() for run in ("low", "high"))
    assert '"seed": 3' in low
    assert '"seed": 0' in high
    assert '"max_steps": 10' in low
    assert '"lr": 0.001' in low


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["experiment=tinny"],
            [
                "config/experiments/tinny.yaml: no such file; "
                "there are: adapters, demo, fragments, meshes, methods, tiny"
            ],
        ),
        (
            ["experimnt=tiny", "trian=3"],
            ["experimnt: unknown key; did you mean experiment?", "trian: unknown key; did"],
        ),
        (
            ["set=train.max_step=3 train.optimizer.lr=-1 runs.lo.seed=1"],
            [
                "3 mistakes in the configuration:",
                "command line: train.max_step: unknown key; did you mean train.max_steps?",
                "command line: train.optimizer.lr = -1: expected a number above 0",
                "command line: runs.lo: no such run; did you mean low?",
            ],
        ),
        (
            ["set=data.source=[nothing.jsonl,local/more.jsonl]"],
            ["data.source = 'nothing.jsonl': no such file or directory"],
        ),
        (
            ["set=data.source=[local/nothing*,local/more.jsonl]"],
            ["data.source = 'local/nothing*': no such file or directory"],
        ),
        (
            ["set=train.global_batch_size=6"],
            [
                "global_batch_size 6 % (local_batch_size 4 * dp 1) = 2, must be 0: use 4 or 8, or another "
                "local_batch_size (runs low, high)"
            ],
        ),
    ],
)
def test_mistakes_are_said_in_words(tiny: Project, arguments: list[str], says: list[str]) -> None:
    done = tiny.snakemake("-n", "--config", *arguments)
    assert done.returncode == 1
    assert "WorkflowError" in done.stdout
    for text in says:
        assert text in done.stdout
    assert "Traceback" not in done.stdout
    assert "rule" not in done.stdout.split("WorkflowError")[1].replace("workflow/rules", "")


def test_snakemake_report(tiny: Project) -> None:
    tiny.run("--cores", "2")
    tiny.run("--report", "page.html")
    page = (tiny.path / "page.html").read_text()
    for text in ("Evaluation", "Training", "Serving", "Plots", "scored on the same items", "throughput"):
        assert text in page


def test_rules_and_stand_ins_name_the_report_s_plots() -> None:
    for file in (STAND_IN / "sitecustomize.py", ROOT / "workflow/rules/common.smk"):
        named = re.search(r"^PLOTS = ([(\[].*?[)\]])$", file.read_text(), re.MULTILINE | re.DOTALL)
        assert named
        assert list(ast.literal_eval(named[1])) == list(PLOTS)


def test_results_that_are_no_folder(tmp_path: Path) -> None:
    project = make_project(tmp_path, TINY)
    (project.path / "file").write_text("")
    done = typed(project, "--cores", "1", "--config", "experiment=tiny", "results_dir=file/results")
    assert done.returncode != 0
    assert "file is not a folder: set results_dir to one" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_failing_stage_leaves_no_output(tmp_path: Path) -> None:
    """For real, without stand-ins: the data file is empty."""
    project = make_project(tmp_path, TINY)
    (project.path / "local/rows.jsonl").write_text("")
    done = typed(project, "--cores", "1", "--config", "experiment=tiny", "--until", "fetch_data")
    assert done.returncode != 0
    assert "local/rows.jsonl" in done.stdout.split("fetch_data: error: ")[1].splitlines()[0]
    assert not list((project.path / "results/store").glob("data/*/manifest.json"))
