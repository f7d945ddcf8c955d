"""The report of an experiment, made from files as the stages leave them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from dayzero.reporting import table as terminal
from dayzero.reporting.collect import read_runs
from dayzero.reporting.facts import data_tables, differences_table, stage_seconds
from dayzero.reporting.latex import escape, latex_table
from dayzero.reporting.plots import PLOTS, scores_plot
from dayzero.reporting.scores import score_table, tidy_scores
from dayzero.stages.report import main

from .report_files import run_config, task, write_demo, write_run

FILES = {"index.html", "results.csv", "results.tex", *(f"{name}.{kind}" for name in PLOTS for kind in ("svg", "png"))}


def make_report(experiment: str, runs: list[Path], output: Path, description: str = "") -> int:
    arguments = ["--experiment", experiment, "--description", description]
    return main([*arguments, "--runs", *map(str, runs), "--output", str(output)])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    """(run directories, report directory) of base and lora."""
    results = tmp_path_factory.mktemp("results")
    runs = write_demo(results)
    output = results / "demo/report"
    assert make_report("demo", runs, output) == 0
    return runs, output


class Page(HTMLParser):
    """What a page shows and loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.shown: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.shown.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(filter(None, self.shown)).replace("\xa0", " ")


def test_all_files_are_written_and_each_plot_is_a_picture(demo: tuple[list[Path], Path]) -> None:
    _, output = demo
    assert {path.name for path in output.iterdir()} == FILES
    for name in PLOTS:
        assert ElementTree.parse(output / f"{name}.svg").getroot().tag.endswith("svg")
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_what_the_experiment_asks(demo: tuple[list[Path], Path], tmp_path: Path) -> None:
    runs, _ = demo
    assert make_report("demo", runs, tmp_path / "report", "Does <b> help?\n") == 0
    page = (tmp_path / "report/index.html").read_text()
    assert '<p class="description">Does &lt;b&gt; help?</p>' in page


def test_the_page_holds_the_data_report(demo: tuple[list[Path], Path]) -> None:
    _, output = demo
    dom = (output / "index.html").read_text()
    for shown in ("2 (1.7 %)", "with 70 % of their 8-grams in training rows", "3 of 1,580 (0.2 %)", "en 987, es 13"):
        assert shown in dom
    assert "15.3 %" in dom, "the share of supervised tokens"
    page = Page(dom).text
    for shown in ("set aside in rejected.jsonl 5 rows (a.jsonl: 3, b.jsonl: 2)", "dropped: too long 211"):
        assert shown in page
    for shown in ("truncated", "split up", "with control-token text", "reasoning left out", "2 no labels"):
        assert shown in page
    assert "Share of supervised tokens" in page
    assert "tool_calls 17 92 % a.jsonl:12 Is <b> it?" in page
    assert "tool_calls 4 75 % row 1,501 As earlier reports have it" in page
    assert " 801 1,571 399,990" in page, "what became of each source"
    assert "source rows read licence" in page, "and of them some were left out"
    assert "lora a.jsonl 62.50 % 1,300 2.50 lora b.jsonl 37.50 % 780 0.14" in page, "what was drawn of a mix"


def test_csv_has_one_row_for_each_score_with_the_values_of_the_files(demo: tuple[list[Path], Path]) -> None:
    runs, output = demo
    frame = pd.read_csv(output / "results.csv")
    expected = {}
    for run in runs:
        for name, result in json.loads((run / "eval/results.json").read_text())["tasks"].items():
            for metric, score in result["metrics"].items():
                expected[run.name, name, metric] = score
    assert len(frame) == len(expected) == 12
    for row in frame.itertuples():
        score = expected[row.run, row.task, row.metric]
        assert row.value == score["value"]
        assert row.stderr == pytest.approx(score["stderr"], rel=1e-12)
        assert row.n == 120
    lora = frame[frame.run == "lora"].iloc[0]
    assert (lora.method, lora.steps, lora.trainable_parameters) == ("lora", 60, 4_884_480)
    assert frame[frame.run == "base"].steps.isna().all()


def test_first_table_compares_runs_on_the_same_items_and_marks_the_best(demo: tuple[list[Path], Path]) -> None:
    runs, output = demo
    table = score_table(tidy_scores("demo", read_runs(runs)))
    assert table.runs == ["base", "lora"]
    assert table.tasks == {"tool_calls": "0-shot · n = 120", "tool_calls_1shot": "1-shot · n = 120"}
    assert table.incomparable == []
    assert table.unrecorded == []
    assert table.truncated == []
    cells = {(c.task, c.metric): c.cells for c in table.columns}
    base, lora = cells["tool_calls", "correct_call"]
    assert (base.text, base.best) == ("0.000 ± 0.000", False)
    assert (lora.text, lora.best) == ("0.417 ± 0.045", True)
    assert cells["tool_calls", "answer_nll"][1].best, "lower is better"
    one_shot = cells["tool_calls_1shot", "correct_call"]
    assert [c.value for c in one_shot] == ["0.067", "\N{EN DASH}"]
    assert not any(c.best for c in one_shot), "one run alone is not the best"
    page = (output / "index.html").read_text()
    assert page.index('id="scores"') < page.index('id="runs"') < page.index('id="plots"')
    assert re.search(r'<td class="number best">0\.417 <span class="stderr">±&nbsp;0\.045', page)
    assert "given the same items" in page


def test_a_panel_of_the_scores_has_the_tasks_of_its_metric_alone(demo: tuple[list[Path], Path]) -> None:
    runs = read_runs(demo[0])
    scores = tidy_scores("demo", runs)
    scores = scores[(scores["metric"] != "answer_nll") | (scores["task"] == "tool_calls")]
    panels = {a.get_title().split()[0]: a for a in scores_plot(runs, scores).axes if a.axison}
    assert panels.keys() == {*scores["metric"]}
    for metric, panel in panels.items():
        own = scores[scores["metric"] == metric]["task"].unique()
        assert len(panel.get_yticks()) == len(own)
        names = [label.get_text().replace("\n", "") for label in panel.get_yticklabels()]
        assert names in ([*own], [])  # none beside a panel of the same tasks
        assert len(panel.containers) == scores[scores["metric"] == metric]["run"].nunique()
    assert {len(panel.get_yticks()) for panel in panels.values()} == {1, 2}


def test_scores_on_other_items_are_shown_as_not_comparable(tmp_path: Path) -> None:
    runs = write_demo(tmp_path)
    results = runs[1] / "eval/results.json"
    changed = json.loads(results.read_text())
    changed["tasks"]["tool_calls"]["items_sha256"] = "ff" * 32
    results.write_text(json.dumps(changed))
    table = score_table(tidy_scores("demo", read_runs(runs)))
    column = table.columns[0]
    assert [c.comparable for c in column.cells] == [True, False]
    assert not any(c.best for c in column.cells)
    assert len(table.incomparable) == 1
    assert "lora" in table.incomparable[0]
    assert make_report("demo", runs, tmp_path / "report") == 0
    page = Page((tmp_path / "report/index.html").read_text()).text
    assert "not comparable" in page
    assert "given the same items" not in page
    assert r"$^\dagger$" in (tmp_path / "report/results.tex").read_text()


def test_cut_answers_and_unrecorded_items_are_told(tmp_path: Path) -> None:
    runs = write_demo(tmp_path)
    results = runs[1] / "eval/results.json"
    changed = json.loads(results.read_text())
    changed["tasks"]["tool_calls"]["truncated_share"] = 0.125
    changed["tasks"]["tool_calls"]["items_sha256"] = None
    results.write_text(json.dumps(changed))
    assert make_report("demo", runs, tmp_path / "report") == 0
    page = Page((tmp_path / "report/index.html").read_text()).text
    assert "tool_calls: 12.5% of the answers of lora were cut at the length limit." in page
    assert "Without a checksum of its items: tool_calls." in page


def test_the_same_runs_give_the_same_bytes(demo: tuple[list[Path], Path], tmp_path: Path) -> None:
    runs, output = demo
    assert make_report("demo", runs, tmp_path / "again") == 0
    assert {name: (tmp_path / "again" / name).read_bytes() for name in FILES} == {
        name: (output / name).read_bytes() for name in FILES
    }


def test_a_changed_stage_file_changes_the_report(demo: tuple[list[Path], Path], tmp_path: Path) -> None:
    runs = write_demo(tmp_path)
    changes = [
        ("serve/parity.json", {"max_logprob_difference": 7.7e-5}, "7.7e-05"),
        ("train/summary.json", {"tokens_per_second": 4321.0}, "4,321"),
        ("model/manifest.json", {"reload": {"max_logit_difference": 6.6e-6}}, "6.6e-06"),
    ]
    for stage_file, number, _ in changes:
        path = runs[1] / stage_file
        path.write_text(json.dumps({**json.loads(path.read_text()), **number}))
    assert make_report("demo", runs, tmp_path / "report") == 0
    before, after = (Page((folder / "index.html").read_text()).text for folder in (demo[1], tmp_path / "report"))
    for _, _, shown in changes:
        assert shown not in before
        assert shown in after


def test_page_loads_nothing_from_elsewhere(demo: tuple[list[Path], Path]) -> None:
    html = (demo[1] / "index.html").read_text()
    page = Page(html)
    assert all(url.startswith(("#", "data:")) for url in page.loads)
    assert not page.tags & {"script", "iframe", "object", "embed", "base"}
    assert not re.search(r"url\((?!#)|@import", html)


def test_hostile_names_are_text_everywhere(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>$x_1$ %\\input{/etc/passwd} & \"q\" 'a' {{ 7*7 }} ]]> --"
    data = {"source": evil, "format": "text"}
    run = run_config("demo", "lora", "lora", data=data, evaluate={"tasks": [evil]})
    other = run_config("demo", "base", "none", data={**data, "source": evil + "2"})
    runs = [write_run(tmp_path, run, {evil: task(0.5, 0.5, 0.5, 1.0)}), write_run(tmp_path, other, None)]
    parity = runs[0] / "serve/parity.json"
    parity.write_text(json.dumps({**json.loads(parity.read_text()), "verdict": '"><img src=x onerror=alert(1)>'}))
    output = tmp_path / "report"
    assert make_report(evil, runs, output) == 0
    html = (output / "index.html").read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert "{{ 7*7 }}" in page.text
    for name in PLOTS:
        assert ElementTree.parse(output / f"{name}.svg").getroot().find(".//{*}script") is None
    tex = (output / "results.tex").read_text()
    assert r"\input" not in tex
    assert r"\textbackslash{}input\{/etc/passwd\}" in tex
    assert pd.read_csv(output / "results.csv")["task"].iloc[0] == evil


def test_a_run_without_training_or_tasks_still_makes_a_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_run(tmp_path, run_config("bare", "base", "none", evaluate={"tasks": []}), None)
    output = tmp_path / "report"
    assert make_report("bare", [run], output) == 0
    assert {path.name for path in output.iterdir()} == FILES
    page = Page((output / "index.html").read_text()).text
    assert "No run was evaluated" in page
    assert "No run was trained" in page
    assert len(pd.read_csv(output / "results.csv")) == 1
    assert r"\begin{tabular}{l}" in (output / "results.tex").read_text()
    assert terminal.main([str(output / "results.csv")]) == 0
    assert "No run was evaluated" in capsys.readouterr().out


def test_a_run_with_only_its_config_is_shown_with_dashes(tmp_path: Path) -> None:
    directory = tmp_path / "results/demo/lora"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(run_config("demo", "lora", "lora").resolved()))
    assert make_report("demo", [directory], tmp_path / "report") == 0
    assert "No stage recorded its time" in (tmp_path / "report/index.html").read_text()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.json").unlink(), "config.json does not exist: give the directory of a run"),
        (lambda run: (run / "config.json").write_text('{"run": "lora", "rum": 1}'), "resolve_config"),
        (lambda run: (run / "eval/results.json").write_text("{"), "results.json is not JSON"),
        (lambda run: (run / "train/metrics.jsonl").write_text('{"step": 1}\n'), "metrics.jsonl has no step and loss"),
        (lambda run: (run / "train/metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"st'), "metrics.jsonl:2"),
    ],
)
def test_spoilt_files_give_one_line_and_no_output(spoil, message, tmp_path: Path, capsys) -> None:
    runs = write_demo(tmp_path)
    spoil(runs[1])
    assert make_report("demo", runs, tmp_path / "report") == 1
    last = capsys.readouterr().err.strip().splitlines()
    assert len(last) == 1
    assert message in last[0]
    assert not (tmp_path / "report").exists()


def test_a_run_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = write_demo(tmp_path)
    assert make_report("demo", [runs[0], runs[0]], tmp_path / "report") == 1
    assert "base were given more than once" in capsys.readouterr().err


def test_the_last_line_of_a_repeated_step_counts(tmp_path: Path) -> None:
    run = write_demo(tmp_path)[1]
    with open(run / "train/metrics.jsonl", "a") as f:
        f.write('{"step": 50, "loss": 9.5}\n')
    metrics = read_runs([run])[0].metrics
    assert metrics is not None
    assert list(metrics["step"]) == list(range(1, 61))
    assert metrics["loss"][49] == 9.5


def test_shared_stages_are_counted_once(tmp_path: Path) -> None:
    bars = stage_seconds(read_runs(write_demo(tmp_path)))
    assert bars["shared"] == {"fetch_model": 24.1, "fetch_data": 6.4, "check_data": 2.2, "tokenize": 9.8}
    assert set(bars["base"]) == {"export", "evaluate", "verify_serving"}
    assert bars["lora"]["train"] == 181.0


def test_overlap_check_and_config_differences_are_shown(tmp_path: Path) -> None:
    runs = read_runs(write_demo(tmp_path))
    ((_, sources, facts),) = data_tables(runs)
    assert ["overlap: test train questions", "0"] in facts.rows
    assert ["split test", "120 rows, 107 different questions"] in facts.rows
    assert [row[1:] for row in sources.rows] == [["1,053", "Apache-2.0", "2026.3.23", "5b5b5b5b5b5b"]]
    assert differences_table(runs).rows == [["method.name", "none", "lora"]]


def test_latex_escapes_all_special_characters() -> None:
    assert escape("a_b & 5% of $x$ #1 {y} ~^\\ é") == (
        r"a\_b \& 5\% of \$x\$ \#1 \{y\} \textasciitilde{}\textasciicircum{}\textbackslash{} ?"
    )


def test_latex_rows_have_a_cell_for_every_column(demo: tuple[list[Path], Path]) -> None:
    table = score_table(tidy_scores("demo", read_runs(demo[0])))
    tex = latex_table("demo", table)
    body = tex[tex.index(r"\midrule") : tex.index(r"\bottomrule")].splitlines()[1:-1]
    assert [row.count(" & ") for row in body] == [len(table.columns)] * 2
    assert all(row.endswith(r"\\") for row in body)
    assert r"\textbf{0.417 $\pm$ 0.045}" in body[1]


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_compiles(demo: tuple[list[Path], Path], tmp_path: Path) -> None:
    table = (demo[1] / "results.tex").read_text()
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{table}\end{{document}}"
    (tmp_path / "paper.tex").write_text(document)
    subprocess.run(["pdflatex", "-halt-on-error", "paper.tex"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "paper.pdf").stat().st_size > 1000


@pytest.mark.parametrize("copies", [1, 4])
def test_terminal_table_shows_every_score(demo, copies: int, tmp_path: Path, capsys) -> None:
    frame = pd.read_csv(demo[1] / "results.csv")
    many = pd.concat([frame.assign(run=frame["run"] + ("" if i == 0 else f"-{i}")) for i in range(copies)])
    many.to_csv(tmp_path / "results.csv", index=False)
    assert terminal.main([str(tmp_path / "results.csv")]) == 0
    out = capsys.readouterr().out
    assert out.count("0.417") == copies
    assert "correct_call" in out.replace("\n", "")
    assert f"report: {tmp_path / 'index.html'}" in out.splitlines()[-1]


def test_terminal_table_without_a_report_says_so_in_one_line(tmp_path: Path, capsys) -> None:
    assert terminal.main([str(tmp_path / "results.csv")]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "make the report first" in err


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_a_browser_opens_the_page_without_complaint(demo: tuple[list[Path], Path], tmp_path: Path) -> None:
    """The page forbids itself to load anything, so a request to elsewhere would be a console message too."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom"
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]

    def browse(page: Path) -> tuple[str, list[str]]:
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    dom, complaints = browse(demo[1] / "index.html")
    assert complaints == []
    assert dom.count("<figure") == len(PLOTS)
    assert dom.count("<svg") == len(PLOTS)

    tampered = tmp_path / "index.html"
    outside = '<img src="https://example.org/x.png"><script>1</script></body>'
    tampered.write_text((demo[1] / "index.html").read_text().replace("</body>", outside))
    assert len(browse(tampered)[1]) >= 2, "the check must see what the page may not do"
