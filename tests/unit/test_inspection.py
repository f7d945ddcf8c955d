"""What `make inspect` shows: every token once, the supervised ones marked, documents apart, nothing obeyed."""

from __future__ import annotations

import html
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dayzero.data.inspection import visible
from dayzero.experiment import load_experiment
from dayzero.stages import fetch_data, inspect_rows, tokenize
from dayzero.wiring import Wiring

from tests.tiny_tokenizer import tiny_tokenizer

EXPERIMENT = """
defaults:
  data: {source: rows.jsonl, validation_size: 0}
  model.source: model
  train.max_steps: 1
  tokenize.seq_len: 128
runs:
  lora: {}
"""
CHATS = [("Hi\n☃ 👩‍👩‍👧", "The answer is 42."), ("\x1b[31m<b>&\u202e", "<script>alert(1)</script> e\u0301")]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment whose data and tokens are made."""
    path = tmp_path_factory.mktemp("inspect")
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "n": n}
        for n, (q, a) in enumerate(CHATS)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "exp.yaml").write_text(EXPERIMENT)
    (path / "config").mkdir()
    (path / "config/config.yaml").write_text("experiment: demo\nresults_dir: results\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        wiring = Wiring(load_experiment(path / "exp.yaml"), "results")
        run = wiring.run("lora")
        tokenizer = tiny_tokenizer(Path(wiring.tokenizer(run)))
        config = ["--config", wiring.spec("data", Path(wiring.data(run)).name)]
        assert fetch_data.main([*config, "--output", wiring.data(run)]) == 0
        config = ["--config", wiring.spec("tokens", Path(wiring.tokens(run)).name)]
        folders = ["--data", wiring.data(run), "--tokenizer", str(tokenizer), "--output", wiring.tokens(run)]
        assert tokenize.main([*config, *folders]) == 0
    return path


def run(*arguments: str) -> int:
    return inspect_rows.main(["--experiment", "./exp.yaml", "--run", "lora", *arguments])


def test_a_row(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(project)
    assert run() == 0
    printed = capsys.readouterr().out
    assert "supervised⟧  not supervised" in printed.splitlines()[-1]
    printed = "\n".join(printed.splitlines()[:-1])
    for _, answer in CHATS:
        assert f"<|im_start|>assistant↵\n⟦{visible(answer)}<|im_end|>⟧↵\n" in printed + "\n", "there are no colours"
    page = (project / "results/exp/lora/inspect.html").read_text()
    for number, (question, answer) in enumerate(CHATS, 1):
        for text in (question, answer):
            assert visible(text) in printed
        assert f"document {number} · rows.jsonl:{number} · " in printed
        assert f"document {number} · rows.jsonl:{number} · " in page
    assert "\x1b" not in page + printed.replace("\x1b[", "")
    assert "\u202e" not in page + printed
    assert "<script>" not in page
    documents = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    assert len(documents) == 2
    for document, (question, answer) in zip(documents, CHATS, strict=True):
        spans = re.findall(r'<span class="(.*?)" title="([\d ]+)">(.*?)</span>', document, re.DOTALL)
        assert html.unescape("".join(text for _, _, text in spans)) == visible(
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        )
        assert html.unescape("".join(t for c, _, t in spans if "s" in c.split())) == visible(answer) + "<|im_end|>"
        assert [html.unescape(t) for c, _, t in spans if "c" in c.split()] == ["<|im_start|>", "<|im_end|>"] * 2


def test_the_page_is_there_when_its_reader_has_seen_enough(project: Path, tmp_path: Path) -> None:
    """As with `make inspect | head -1`."""
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "dayzero.stages.inspect_rows", "--experiment", "./exp.yaml", "--run", "lora"]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        subprocess.run([*command, "--html", str(page)], cwd=project, stdout=closed, check=False)
    assert "document 1 · rows.jsonl:1 · " in page.read_text()


def test_the_target_and_mistakes(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    assert run("--print-target") == 0
    assert (project / capsys.readouterr().out.strip()).is_file()
    for arguments, said in (
        (["--row", "7"], "it has 1 rows, from 0 to 0"),
        (["--split", "validation"], "validation is not there: make it with `snakemake "),
    ):
        assert run(*arguments) == 1
        assert said in capsys.readouterr().err


def test_colours(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    from dayzero.data.inspection import print_rows, view_rows
    from dayzero.data.tokens import TokenRows
    from rich.console import Console
    from transformers import AutoTokenizer

    wiring = Wiring(load_experiment(project / "exp.yaml"), "results")
    config: Any = wiring.run("lora")
    rows = TokenRows(Path(wiring.tokens(config)) / "train")
    tokenizer = AutoTokenizer.from_pretrained(wiring.tokenizer(config))
    out = io.StringIO()
    print_rows(view_rows(rows, range(1), tokenizer), Console(file=out, force_terminal=True, color_system="standard"))
    assert "\x1b[4;32mThe" in out.getvalue()
    assert "\x1b[4;35m<|im_end|>" in out.getvalue()
    assert "document 1 · row 0" in out.getvalue()
    assert "⟦" not in out.getvalue()
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", no_color=True)
    print_rows(view_rows(rows, range(1), tokenizer), console)
    assert "⟦" in out.getvalue(), "as NO_COLOR asks"
