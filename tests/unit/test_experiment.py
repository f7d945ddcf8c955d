"""Experiments: what is merged over what, and what is said about mistakes."""

# ruff: noqa: E501 (messages in whole)

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from dayzero.config import RunConfig
from dayzero.config_keys import KEYS, expected, experiment_schema, run_schema
from dayzero.config_overrides import config_overrides, override_arguments, parse_assignments
from dayzero.errors import ConfigError
from dayzero.experiment import Experiment, load_experiment, main
from dayzero.files import read_json
from dayzero.stages import resolve_config

ROOT = Path(__file__).resolve().parents[2]
GOOD = """
description: what it asks
defaults:
  model.source: m
  data.source: d.jsonl
  train.max_steps: 10
runs:
  a: {}
"""


def load(tmp_path: Path, text: str, overrides: dict[str, Any] | None = None, **recipes: str) -> Experiment:
    """Write an experiment (and recipes) and resolve it."""
    (tmp_path / "recipes").mkdir(exist_ok=True)
    for name, recipe in recipes.items():
        (tmp_path / "recipes" / f"{name}.yaml").write_text(recipe)
    path = tmp_path / "exp.yaml"
    path.write_text(text)
    return load_experiment(path, overrides, recipes=tmp_path / "recipes")


def mistakes(tmp_path: Path, text: str, overrides: dict[str, Any] | None = None, **recipes: str) -> list[str]:
    """The lines of the error, places shortened to file names."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, overrides, **recipes)
    return [line.strip() for line in str(caught.value).replace(f"{tmp_path}/", "").splitlines()]


def test_merge_order(tmp_path: Path) -> None:
    text = """
    recipe: [one, two]
    defaults: {train: {local_batch_size: 1, optimizer.lr: 3.0e-4}, evaluate.tasks: [c]}
    runs:
      a: {train.optimizer: {lr: 4.0e-4}, evaluate: {tasks: [d]}}
      b: {recipe: three}
    """
    runs = load(
        tmp_path,
        text,
        {"train.global_batch_size": 8, "runs.b.train.global_batch_size": 16},
        one="{model.source: m1, data.source: d1, train: {max_steps: 1, optimizer: {lr: 1.0e-4, eps: 1.0e-6}}}",
        two="{train.max_steps: 2, model.source: m2, evaluate.tasks: [a, b]}",
        three="{model.source: m3, train.local_batch_size: 2}",
    ).runs
    a, b = runs["a"], runs["b"]
    assert list(runs) == ["a", "b"]
    assert (a.train.max_steps, a.train.optimizer.eps, a.model.source) == (2, 1e-6, "m2")  # the later recipe wins
    assert (a.train.optimizer.lr, b.train.optimizer.lr) == (4e-4, 3e-4)  # recipe < defaults < run
    assert (a.evaluate.tasks, b.evaluate.tasks) == (["d"], ["c"])  # lists replace
    assert (b.model.source, b.train.local_batch_size) == ("m3", 1)  # a run's recipe still comes before the defaults
    assert (a.train.global_batch_size, b.train.global_batch_size) == (8, 16)  # the command line wins
    assert (a.experiment, a.run) == ("exp", "a")


def test_open_mappings_merge_and_keep_their_keys(tmp_path: Path) -> None:
    text = """
    defaults:
      data: {source: d.jsonl, sha256: {d.jsonl: abc}, columns: {prompt: q}}
      method.name: pretrain
      train.max_steps: 1
      model: {architecture: {model_type: llama, hidden_size: 8}, tokenizer: {}}
    runs:
      a: {model.architecture.rope_parameters.rope_theta: 5, model.architecture: {hidden_size: 16}, data.columns: {completion: r}}
    """
    run = load(tmp_path, text).runs["a"]
    assert run.model.architecture == {"model_type": "llama", "hidden_size": 16, "rope_parameters": {"rope_theta": 5}}
    assert run.model.tokenizer is not None
    assert run.data.sha256 == {"d.jsonl": "abc"}
    assert run.data.columns == {"prompt": "q", "completion": "r"}


def test_null_takes_back_a_mapping(tmp_path: Path) -> None:
    text = GOOD.replace("a: {}", "a: {data.sha256: null}").replace(
        "data.source: d.jsonl", "data: {source: d, sha256: {d: x}}"
    )
    assert load(tmp_path, text).runs["a"].data.sha256 is None


def test_yaml_anchors(tmp_path: Path) -> None:
    text = GOOD.replace("a: {}", "a: &a {seed: 1}\n  b: {<<: *a, train.max_steps: 20}")
    runs = load(tmp_path, text).runs
    assert (runs["b"].seed, runs["b"].train.max_steps, runs["a"].train.max_steps) == (1, 20, 10)


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    text = """\
descripton: x
train: {max_steps: 3}
defaults:
  model.source: m
  data: {source: d, validation_siez: 3}
  train: {max_steps: 1e3, lr: 1.0e-3, compile: "yes"}
  train.optimizer.lr: 1e-4
  parallelism: 4
runs:
  a: {train.num_epochs: "2"}
  b/c: {}
  Report: {}
  A: {method.name: lorra}
"""
    assert mistakes(tmp_path, text) == [
        "13 mistakes in the configuration:",
        "exp.yaml:1: descripton: unknown key; did you mean description?",
        "exp.yaml:2: train: unknown key; put it under defaults: (as train)",
        "exp.yaml:11: runs.b/c: a run's name has letters, digits, '_', '-' and '.', and starts with a letter or digit",
        "exp.yaml:12: runs.Report: this name cannot be used: the report's folder has that name",
        "exp.yaml:13: runs.A: differs from runs.a only in case: rename one",
        "exp.yaml:5: data.validation_siez: unknown key; did you mean data.validation_size?",
        "exp.yaml:6: train.lr: unknown key; did you mean train.optimizer.lr?",
        "exp.yaml:8: parallelism = 4: expected a mapping with keys of strategy, dp_replicate, dp_shard, tp, sequence_parallel, cp, cp_method, pp, pp_schedule, ep",
        "exp.yaml:6: train.max_steps = '1e3': expected an integer above 0 or null; YAML reads 1e3 as text: write 1000",
        "exp.yaml:10: train.num_epochs = '2': expected a number above 0 or null; it is quoted, so it is text: leave the quotes out",
        "exp.yaml:6: train.compile = 'yes': expected true or false",
        "exp.yaml:7: train.optimizer.lr = '1e-4': expected a number above 0; YAML reads 1e-4 as text: write 1.0e-4",
        "exp.yaml:13: method.name = 'lorra': expected one of none, full, lora, qlora, kd, pretrain",
    ]


COMBINATIONS = {
    "train.num_epochs: 2": "train.max_steps = 10: and train.num_epochs = 2 both say how long to train: set one of them to null",
    "train.max_steps: null": "train.max_steps = None: nothing says how long to train: set train.max_steps or train.num_epochs",
    "{train.global_batch_size: 12, parallelism.dp_shard: 2}": "train.global_batch_size = 12: global_batch_size 12 % "
    "(local_batch_size 4 * dp 2) = 4, must be 0: use 8 or 16, or another local_batch_size",
    "train.global_batch_size: 2": "train.global_batch_size = 2: global_batch_size 2 % (local_batch_size 4 * dp 1) "
    "= 2, must be 0: use 4, or another local_batch_size",
    "{parallelism: {strategy: none, dp_shard: 2}}": "parallelism.strategy = 'none': none is one process, but dp_replicate 1 "
    "x dp_shard 2 x cp 1 x tp 1 = 2: use fsdp2, or sizes of 1",
    "{parallelism: {strategy: ddp, dp_shard: 2}}": "parallelism.dp_shard = 2: ddp keeps whole copies, but dp_replicate 1 x dp_shard 2 x cp 1 x tp 1 = 2: use dp_replicate 2 "
    "and dp_shard 1, or strategy fsdp2",
    "model.source: null": "model.source = None: method.name lora needs a model: use hf:, package: or a local path",
    "data.weights: [1, 2]": "data.weights = [1, 2]: 2 weights for 1 sources: give one for each",
    "data.template: {text: '{a.b}'}": "data.template.text = '{a.b}': {a.b} is not a plain column name: a template holds {column} and "
    "nothing else (no attributes, items, conversions or formats); rename the column with data.columns if its name has such characters",
    "{data: {format: text, template: {text: '{a}'}}}": "data.template = {'text': '{a}'}: goes with data.format template (or auto), "
    "this run's is text",
    "data.format: template": "data.template: data.format template needs it, e.g. {user: '{question}', assistant: '{answer}'}",
    "{data: {format: pretokenized, max_chars: 9}}": "data.max_chars = 9: pretokenized rows have no characters: set it to null",
    "tokenize.loss_roles: []": "tokenize.loss_roles = []: names nobody, so that nothing would be supervised: name at least one role",
    "tokenize.loss_roles: [user, assistant, user]": "tokenize.loss_roles = ['user', 'assistant', 'user']: names user more than "
    "once: once is enough",
    "tokenize: {seq_len: 128, min_label_tokens: 128}": "tokenize.min_label_tokens = 128: 128 >= tokenize.seq_len 128, of which the "
    "first is never supervised, so that no document would be left: set it lower",
    "data.columns: {promt: x}": "data.columns = {'promt': 'x'}: 'promt' is not a column of any format (did you mean prompt?): they "
    "have messages, system, tools, conversations, input_ids, labels, loss_mask, attention_mask, instruction, output, input, history, "
    "context, question, answers, choices, answer, prompt, completion, text, id",
    "data: {format: alpaca, columns: {input: a, prompt: x}}": "data.columns = {'input': 'a', 'prompt': 'x'}: 'prompt' is not a column "
    "of alpaca: it has instruction, output, input, system, history, tools, id",
    "{tokenize: {loss_parts: tool_arguments, loss_roles: [user]}}": "tokenize.loss_parts = 'tool_arguments': tool_arguments are the "
    "assistant's: leave tokenize.loss_roles at [assistant]",
    "data.source: null": "data.source = None: name the rows to use (hf:, package: or local files)",
    "data.source: s3://bucket": "data.source = 's3://bucket': 's3://bucket' is a URL, which is not a source: download it and "
    "give its path",
    "data.source: pakage:x==1/y": "data.source = 'pakage:x==1/y': unknown source 'pakage:x==1/y' (did you mean `package:`?): give "
    "`hf:org/name@revision`, a local path, or `package:NAME==VERSION/path/inside`",
    "data.source: package:x": "data.source = 'package:x': 'package:x' is no package source: write "
    "`package:NAME==VERSION/path/inside`",
    "model.source: 'hf:a/b c'": "model.source = 'hf:a/b c': 'hf:a/b c' is no hub source: write `hf:org/name` or "
    "`hf:org/name@revision`",
    "model.source: 'models/*'": "model.source = 'models/*': 'models/*' is a glob, and a model is one folder or file: give its path",
    "model.architecture.model_type: llama": "model.architecture = {'model_type': 'llama'}: only with method.name pretrain, "
    "this run's is lora: set it to null",
    "{method.name: pretrain, model.source: null}": "model.architecture: method.name pretrain needs model.architecture, or a "
    "model.source to copy it from",
    "{method.name: pretrain, model: {source: null, architecture.model_type: llama}}": "model.tokenizer: pretraining needs a "
    "tokenizer: train one (model.tokenizer.vocab_size) or take that of a model.source",
    "{method.name: pretrain, model: {architecture.model_type: llama, tokenizer: {}}}": "model.source = 'm': would be ignored: "
    "model.architecture and model.tokenizer replace all of it; set model.source: null",
    "{method.name: pretrain, model.architecture.hidden_size: 8}": "model.architecture = {'hidden_size': 8}: needs the "
    "transformers name of the model, e.g. model_type: llama",
    "train.lr_scheduler.warmup_steps: 11": "train.lr_scheduler.warmup_steps = 11: warmup_steps 11 is more than "
    "train.max_steps 10",
    "train.lr_scheduler: {name: wsd, warmup_steps: 5, decay_steps: 6}": "train.lr_scheduler.warmup_steps = 5: warmup_steps 5 "
    "+ decay_steps 6 is more than train.max_steps 10",
    "data.answers: x.json": "data.answers = 'x.json': only data.format function_calling has accepted answers, this run's is "
    "auto",
    "data.format: function_calling": "data.answers: data.format function_calling needs the files with the accepted answers",
    "data.test_size: 1.0": "data.test_size = 1.0: a share must be at least 0 and below 1; for a number of rows write an integer",
    "data: {test_size: 0.5, validation_size: 0.5}": "data.test_size = 0.5: no rows left to train on: validation_size 0.5 + "
    "test_size 0.5 >= 1",
    "data: {source: [a, b], sha256: abc}": "data.sha256 = 'abc': one sum for 2 sources: give a mapping of source to sum",
    "data: {validation_source: v, sha256: abc}": "data.sha256 = 'abc': one sum for 2 sources: give a mapping of source to sum",
    "data: {sha256: {d.json: abc}}": "data.sha256 = {'d.json': 'abc'}: 'd.json' is not one of the sources: use a source's exact text",
    "data: {source: hf:a/b, sha256: abc}": "data.sha256 = 'abc': hf:a/b is a hub data set: pin its commit instead, "
    "`hf:org/name@commit`",
    "data: {source: [a, b, c], max_rows: 2}": "data.max_rows = 2: 2 rows for 3 sources, which share them evenly: give at least one "
    "row for each, or name fewer sources",
    "data: {format: function_calling, answers: a.json, columns: {id: x}}": "data.columns = {'id': 'x'}: is not read by data.format "
    "function_calling: leave it out",
    "data: {format: function_calling, answers: hf:a/b}": "data.answers = 'hf:a/b': hf:a/b: answers are read from files: give a local "
    "path or a package",
    "data: {template: {text: '{a} {b}'}, columns: {c: x, a: y}}": "data.columns = {'c': 'x', 'a': 'y'}: 'c' is not in data.template, "
    "which names a, b: use one of them",
    "evaluate: {tasks: [x], extra_tasks: [x]}": "evaluate.tasks = ['x']: x is named twice (in tasks and extra_tasks together)",
    "export.max_shard_size: big": "export.max_shard_size = 'big': write a number and a unit, e.g. 5GB",
    "{method.name: pretrain, tokenize.seq_len: 512, model: {source: null, tokenizer.vocab_size: 300, architecture: {model_type: gpt2, "
    "n_positions: 256}}}": "tokenize.seq_len = 512: longer than the context of the new model, model.architecture.n_positions "
    "256: lower the one or raise the other",
    "method.lora.targets: '(('": "method.lora.targets = '((': no regular expression: missing ), unterminated subpattern at position 1",
    "method.lora.targets: []": "method.lora.targets = []: names no module: use all-linear, module names or a regular "
    "expression",
    "{method.lora.dora: true, parallelism.tp: 2}": "method.lora.dora = True: needs the lengths of whole weight rows, which "
    "parallelism.tp 2 splits: use dp_shard, or turn it off",
    "{method: {name: full, freeze: ['*norm*']}, parallelism.pp: 2}": "method.freeze = ['*norm*']: parallelism.pp 2 may leave a "
    "stage with nothing to train: set pp 1, or empty it",
    "{method: {name: full, freeze: ['*norm*']}, parallelism.strategy: megatron_fsdp}": "parallelism.strategy = 'megatron_fsdp': "
    "method.freeze freezes weights, which Megatron-FSDP frees while they are still needed: use fsdp2",
    "method.freeze: ['*norm*']": "method.freeze = ['*norm*']: adapters leave all other weights frozen: choose what they adapt by "
    "method.lora.targets",
    "method.name: kd": "method.kd.teacher: method.name kd needs it: name a run of this experiment, or a model as in model.source",
    "{method: {name: kd, kd.teacher: a}, train.loss: cross_entropy}": "train.loss = 'cross_entropy': method.name kd has a chunked "
    "loss of its own: use auto or chunked",
    "{method: {name: kd, kd.teacher: a}, parallelism.pp: 2}": "method.name = 'kd': kd does not go with parallelism.pp 2: use "
    "dp_shard, tp or cp",
    "{method: {name: kd, kd.teacher: a}, parallelism: {dp_shard: 2, ep: 2}}": "method.name = 'kd': kd is not tried with "
    "parallelism.ep 2: use dp_shard, tp or cp",
    "{method: {name: kd, kd.teacher: 's3://b'}}": "method.kd.teacher = 's3://b': 's3://b' is a URL, which is not a source: "
    "download it and give its path",
    "{method.name: qlora, parallelism.tp: 2}": "method.name = 'qlora': qlora does not go with parallelism.tp 2: use dp_shard, "
    "dp_replicate or cp",
    "{method: {name: qlora, lora.dora: true}}": "method.lora.dora = True: needs the lengths of weight rows, which method.name "
    "qlora has in 4 bits: use lora",
    "train.loss: loss_parallel": "train.loss = 'loss_parallel': splits the vocabulary over the ranks of parallelism.tp, which is "
    "1: set tp, or use auto",
    "{train.loss: liger_fused, parallelism.pp: 2}": "train.loss = 'liger_fused': does not go with parallelism.pp 2: use auto or "
    "chunked, or set pp 1",
    "train: {loss: cut_cross_entropy, z_loss: 1.0e-4}": "train.z_loss = 0.0001: does not go with train.loss cut_cross_entropy: use "
    "auto, chunked or liger_fused",
    "export.weights: ema": "export.weights = 'ema': there is no average without train.ema: set train.ema.decay, or use last",
    "train: {checkpoint: {keep_best: 1, every: 30}, validate_every: 20}": "train.checkpoint.keep_best = 1: needs a validation "
    "loss at each checkpoint, but train.checkpoint.every 30 % train.validate_every 20 = 10, must be 0: use a multiple of 20",
    "{train.checkpoint.keep_best: 1, data.validation_size: 0}": "train.checkpoint.keep_best = 1: needs a validation loss, but "
    "data.validation_size is 0: hold rows out, or set keep_best to 0",
    "train: {checkpoint.keep_best: 2, validate_every: 0}": "train.checkpoint.keep_best = 2: only the last step to choose "
    "from, since train.validate_every is 0: set it, or keep_best to 0",
    "train.optimizer.betas: [0.9, 1.0]": "train.optimizer.betas = [0.9, 1.0]: both must be at least 0 and below 1",
}


@pytest.mark.parametrize("setting", COMBINATIONS)
def test_impossible_combination(tmp_path: Path, setting: str) -> None:
    braced = setting if setting.startswith("{") else "{" + setting + "}"
    head, *lines = mistakes(tmp_path, GOOD.replace("a: {}", f"a: {braced}"))
    assert head == "1 mistake in the configuration:"
    line = GOOD[: GOOD.index("a: {}")].count("\n") + 1
    inherited = 6 if setting == "train.num_epochs: 2" else 4 if "tokenizer: {}" in setting else line
    place = f"exp.yaml:{inherited}" if " = " in COMBINATIONS[setting].split(": ")[0] else "exp.yaml"  # not set anywhere
    assert lines == [f"{place}: {COMBINATIONS[setting]} (run a)"]


def test_mistakes_in_shared_settings_are_said_once(tmp_path: Path) -> None:
    runs = "\n  ".join(f"r{i}: {{}}" for i in range(9))
    lines = mistakes(tmp_path, GOOD.replace("a: {}", runs).replace("train.max_steps: 10", "train.global_batch_size: 3"))
    assert len(lines) == 3
    assert lines[1].endswith("(runs r0, r1, r2, r3, r4 and 4 more)")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("runs: {a: {}\n", "exp.yaml:2: not valid YAML"),
        ("runs: {}\nruns: {}\n", "exp.yaml:2: duplicate key runs (first on line 1): keep one"),
        ("defaults: {train: {max_steps: 1, max_steps: 2}}", "exp.yaml:1: duplicate key max_steps (first on line 1)"),
        (
            "runs: !!python/object/apply:os.system [ls]",
            "exp.yaml:1: tag:yaml.org,2002:python/object/apply:os.system is not allowed",
        ),
        ("defaults: &x {train: *x}", "an alias that contains itself: write its values out"),
        ("? [a]\n: 1\n", "exp.yaml:1: a key must be a plain word, not a list or mapping: put it in quotes"),
        ("", "exp.yaml: runs: name at least one run"),
        ("[1]", "the file = [1]: expected a mapping of keys"),
        ("recipe: lara\n" + GOOD, "recipe = 'lara': no recipes/lara.yaml; did you mean lora?"),
        (
            "defaults: {train: {max_steps: 1}, train.max_steps: 2}",
            "train.max_steps: said twice in the same place: keep one",
        ),
        (GOOD + "  b: {train.optimizer.lr: .nan}", "train.optimizer.lr = nan: not a finite number"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, says: str) -> None:
    assert says in "\n".join(mistakes(tmp_path, text, lora="{}"))


def test_experiment_names(tmp_path: Path) -> None:
    for name, says in {"my exp": "must match", "store": "the folder shared by all experiments"}.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(GOOD)
        with pytest.raises(ConfigError, match=says):
            load_experiment(path)
    with pytest.raises(ConfigError, match=r"no such file; there are: my exp, store"):
        load_experiment(tmp_path / "none.yaml")


def test_command_line_texts() -> None:
    texts = ["train.optimizer.lr=1e-3", "evaluate.tasks=[a, 2e5]", "model.source=null", "data.source=a=b", "seed=3"]
    assert parse_assignments(texts) == {
        "train.optimizer.lr": 0.001,
        "evaluate.tasks": ["a", 200000.0],
        "model.source": None,
        "data.source": "a=b",
        "seed": 3,
    }
    for text in ("seed", "seed=", "=3"):
        with pytest.raises(ConfigError, match="write key=value"):
            parse_assignments([text])


def test_snakemake_config() -> None:
    config = {
        "experiment": "demo",
        "set": "seed=3 'evaluate.tasks=[a, b]'",
        "train": {"max_steps": "10", "optimizer": {"lr": "1e-3", "betas": ["0.9", "0.95"]}},
        "runs": {"lora": {"seed": "4"}},
    }
    overrides = config_overrides(config, ["experiment"])
    assert overrides == {
        "seed": 3,
        "evaluate.tasks": ["a", "b"],
        "train.max_steps": 10,
        "train.optimizer.lr": 0.001,
        "train.optimizer.betas": [0.9, 0.95],
        "runs.lora.seed": 4,
    }
    with pytest.raises(ConfigError, match=r"experimnt: unknown key; did you mean experiment\?"):
        config_overrides({"experimnt": 1}, ["experiment"])


def test_override_arguments_reach_only_their_run_and_survive_the_shell() -> None:
    overrides = {
        "seed": 3,
        "runs.a.train.optimizer.lr": 1e-5,
        "runs.b.seed": 4,
        "data.subset": "10",
        "resources.train.gpu": 1,
        "runs.a.resources.train.gpu": 2,
    }
    texts = override_arguments(overrides, "a")
    assert parse_assignments(texts) == {"seed": 3, "runs.a.train.optimizer.lr": 1e-5, "data.subset": "10"}


def test_runs_with_dots_in_their_names(tmp_path: Path) -> None:
    runs = load(tmp_path, GOOD.replace("a: {}", "v1: {}\n  v1.5: {}"), {"runs.v1.5.seed": 2, "runs.v1.seed": 1}).runs
    assert (runs["v1"].seed, runs["v1.5"].seed) == (1, 2)


def test_a_thousand_runs_resolve_in_seconds(tmp_path: Path) -> None:
    runs = "\n".join(
        f"  r{i}: {{seed: {i}, train.optimizer.lr: {i + 1}.0e-5, method.lora.rank: 8}}" for i in range(1000)
    )
    (tmp_path / "exp.yaml").write_text(GOOD.replace("  a: {}\n", runs))
    started = time.process_time()
    experiment = load_experiment(tmp_path / "exp.yaml")
    assert len(experiment.runs) == 1000
    assert experiment.runs["r999"].train.optimizer.lr == pytest.approx(1e-2)
    assert time.process_time() - started < 5  # 0.2 s of a quiet core


def test_reading_needs_no_torch() -> None:
    code = "import sys, dayzero.wiring, dayzero.stages.resolve_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_resolve_config_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "exp.yaml").write_text(GOOD)
    output = tmp_path / "out/config.json"
    arguments = ["--experiment", str(tmp_path / "exp.yaml"), "--output", str(output)]
    assert resolve_config.main([*arguments, "--run", "a", "--set", "seed=3", "train.optimizer.lr=1e-5"]) == 0
    config = read_json(output)
    assert (config["seed"], config["train"]["optimizer"]["lr"], "resources" in config) == (3, 1e-5, False)
    assert RunConfig.model_validate_json(json.dumps(config)).resolved() == config
    output.unlink()
    capsys.readouterr()
    assert resolve_config.main([*arguments, "--run", "b"]) == 1
    assert "no such run" in capsys.readouterr().err.splitlines()[-1]
    assert not output.exists()


def test_shipped_experiments_resolve_and_fit_their_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = sorted(Path("config/experiments").glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        runs = load_experiment(file).runs
        jsonschema.validate(yaml.safe_load(file.read_text()), experiment_schema())
        for run in runs.values():
            jsonschema.validate(run.resolved(), run_schema())


def test_schemas_are_in_sync() -> None:
    """If this fails: python -m dayzero.experiment --write-schemas workflow/schemas"""
    assert read_json(ROOT / "workflow/schemas/experiment.schema.json") == experiment_schema()
    assert read_json(ROOT / "workflow/schemas/run.schema.json") == run_schema()


def test_command_checks_an_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "exp.yaml").write_text(GOOD)
    assert main([str(tmp_path / "exp.yaml")]) == 0
    assert capsys.readouterr().out == "a\n"
    assert main([str(tmp_path / "exp.yaml"), "--set", "sed=3"]) == 1
    assert "sed: unknown key; did you mean seed?" in capsys.readouterr().err


def test_every_key_says_what_it_expects() -> None:
    assert all(expected(key) for key in KEYS)
    assert expected("train.optimizer.lr") == "a number above 0"
    assert expected("data.columns.prompt") == "text"


def test_one_experiment_has_every_fragment_that_needs_no_gpu() -> None:
    fragments = {path.stem for path in (ROOT / "config/recipes/methods").glob("*.yaml")}
    runs = yaml.safe_load((ROOT / "config/experiments/fragments.yaml").read_text())["runs"].values()
    assert {run["recipe"][-1] for run in runs} == {f"methods/{name}" for name in fragments - {"qlora"}}


@pytest.mark.parametrize("path", sorted((ROOT / "config/recipes/methods").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_method_s_fragment_is_a_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid over a recipe with a model, as its first line says."""
    monkeypatch.chdir(ROOT)
    more = "method.kd.teacher: hf:org/big" if path.stem == "kd" else "seed: 1"
    file = tmp_path / "exp.yaml"
    recipe = f"[smollm2-135m-full, function-calling, methods/{path.stem}]"
    file.write_text(f"recipe: {recipe}\nruns:\n  a: {{{more}}}\n")
    run = load_experiment(file).runs["a"]
    expected = {
        "lora-embeddings": "lora",
        "rslora": "lora",
        "dora": "lora",
        "qlora": "qlora",
        "lora": "lora",
        "kd": "kd",
        "pretrain": "pretrain",
    }
    assert run.method.name == expected.get(path.stem, "full")
    assert path.read_text().startswith("# ")
