"""Settings that would have no effect are refused: nothing configured is ever ignored."""

# ruff: noqa: E501 (messages in whole)

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.test_experiment import GOOD, load, mistakes

IGNORED = {
    "{method: {name: full, lora.rank: 4}}": "method.lora.rank = 4: only method.name lora or qlora uses it, this run's is full",
    "{method.name: none, train.compile: true}": "train.compile = True: method.name none trains nothing, so this would be "
    "ignored",
    "{method.kd.temperature: 2.0}": "method.kd.temperature = 2.0: only method.name kd uses it, this run's is lora",
    "{method.name: none, parallelism.dp_shard: 2}": "parallelism.dp_shard = 2: method.name none trains nothing, so this would "
    "be ignored",
    "{train: {loss: cross_entropy, loss_chunk_size: 8}}": "train.loss_chunk_size = 8: only train.loss auto, chunked "
    "or loss_parallel uses it, this run's is cross_entropy",
    "{train.lr_scheduler.decay_steps: 3}": "train.lr_scheduler.decay_steps = 3: only train.lr_scheduler.name wsd uses it, this "
    "run's is cosine",
    "{train.lr_scheduler: {name: constant, min_lr_ratio: 0.1}}": "train.lr_scheduler.min_lr_ratio = 0.1: "
    "train.lr_scheduler.name constant never lowers the learning rate",
    "{data: {test_source: t.jsonl, test_size: 5}}": "data.test_size = 5: data.test_source gives the rows: leave one of the two "
    "out",
    "{data.subset: en}": "data.subset = 'en': only hf: sources have it",
    "{data.streaming: true}": "data.streaming = True: only hf: sources have it",
    "{data.format: text, tokenize.loss_turns: last}": "tokenize.loss_turns = 'last': only conversations have turns, data.format text "
    "makes none",
    "{data.format: text, tokenize.loss_reasoning: false}": "tokenize.loss_reasoning = False: only conversations have turns, "
    "data.format text makes none",
    "{train.optimizer.muon.nesterov: false}": "train.optimizer.muon.nesterov = False: only train.optimizer.name muon uses it, this "
    "run's is adamw",
    "{train.optimizer.adafactor.beta2_decay: 0.0}": "train.optimizer.adafactor.beta2_decay = 0.0: only train.optimizer.name "
    "adafactor uses it, this run's is adamw",
    "{method.name: none, train.checkpoint.every: 0}": "train.checkpoint.every = 0: method.name none trains nothing, so this would "
    "be ignored",
    "{method.name: none, train.optimizer.muon.lr: 0.1}": "train.optimizer.muon.lr = 0.1: method.name none trains nothing, so this "
    "would be ignored",
    "{method.name: none, data_check.ngram: 5}": "data_check.ngram = 5: method.name none trains nothing, so this would be ignored",
    "{method.name: none, resources.train.gpu: 1}": "resources.train.gpu = 1: method.name none trains nothing, so this would be "
    "ignored",
    "{method.name: none, resources.check_data.threads: 3}": "resources.check_data.threads = 3: method.name none trains nothing, so "
    "this would be ignored",
    "{parallelism.cp_method: ring}": "parallelism.cp_method = 'ring': only parallelism.cp above 1 uses it, this run's is 1",
    "{evaluate.limit: 5}": "evaluate.limit = 5: this run has no evaluate.tasks, so nothing is scored",
    "{evaluate.batch_size: 5}": "evaluate.batch_size = 5: this run has no evaluate.tasks, so nothing is scored",
    "{evaluate.dtype: float32}": "evaluate.dtype = 'float32': this run has no evaluate.tasks, so nothing is scored",
    "{evaluate.seed: 0}": "evaluate.seed = 0: this run has no evaluate.tasks, so nothing is scored",
    "{resources.evaluate.gpu: 1}": "resources.evaluate.gpu = 1: this run has no evaluate.tasks, so nothing is scored",
    "{train.validate_every: 5, data.validation_size: 0}": "train.validate_every = 5: there are no validation rows, since "
    "data.validation_size is 0: hold some out",
    **{
        f"{{method.name: pretrain, model: {{source: null, tokenizer: {{}}, architecture.model_type: llama, {key}: {value}}}}}": f"model.{key} = "
        f"{shown}: only the files of model.source have it, and this run has none"
        for key, value, shown in (
            ("sha256", "abc", "'abc'"),
            ("dtype", "float32", "'float32'"),
            ("allow_pickle", "true", "True"),
        )
    },
}
ASKS_FOR_NOTHING = (
    "{method: {name: full, lora.dora: false, lora.modules_to_save: []}}",
    "{method.name: none, train.ema: null, train.checkpoint.keep_best: 0, resources.train.gpu: 0}",
    "{train.optimizer.muon.lr: null, method.kd.teacher: null}",
    "{data.streaming: false, data.subset: null, evaluate.limit: null}",
    "{data: {validation_source: v.jsonl, validation_size: 0, test_source: t.jsonl, test_size: 0}}",
    "{data.validation_size: 0, train.validate_every: 0}",
)


@pytest.mark.parametrize("setting", IGNORED)
def test_a_run_s_own_setting_is_never_ignored(tmp_path: Path, setting: str) -> None:
    assert mistakes(tmp_path, GOOD.replace("a: {}", f"a: {setting}\n  b: {{}}"))[1:] == [
        f"exp.yaml:8: {IGNORED[setting]}"
    ]


@pytest.mark.parametrize("setting", ASKS_FOR_NOTHING)
def test_what_is_switched_off_may_be_said(tmp_path: Path, setting: str) -> None:
    assert load(tmp_path, GOOD.replace("a: {}", f"a: {setting}\n  b: {{}}")).runs


def test_shared_settings_may_be_of_use_to_some_runs_only(tmp_path: Path) -> None:
    shared = GOOD.replace("train.max_steps: 10", "train.max_steps: 10\n  method.lora.rank: 4")
    load(tmp_path, shared.replace("a: {}", "a: {method.name: none}\n  b: {}"))
    assert mistakes(tmp_path, shared.replace("a: {}", "a: {method.name: full}"))[1:] == [
        "exp.yaml:7: method.lora.rank = 4: no run uses it: only method.name lora or qlora uses it, this run's is full"
    ]
    overridden = GOOD.replace("a: {}", "a: {method.name: full}")
    assert mistakes(tmp_path, overridden, {"method.lora.rank": 4})[1:] == [
        "command line: method.lora.rank = 4: no run uses it: only method.name lora or qlora uses it, this run's is full"
    ]
    several = """
  resources: {train.gpu: 2, evaluate.gpu: 1, check_data.threads: 2}
  data_check.ngram: 5
  evaluate: {limit: 5, dtype: float32}
  parallelism.cp_method: ring
  train.validate_every: 5"""
    some = (
        "a: {method.name: none}\n  b: {parallelism.cp: 2}\n  c: {evaluate.tasks: [t]}\n  d: {data.validation_size: 0}"
    )
    text = GOOD.replace("train.max_steps: 10", f"train.max_steps: 10{several}")
    assert len(load(tmp_path, text.replace("a: {}", some)).runs) == 4
    assert len(mistakes(tmp_path, text.replace("a: {}", "a: {method.name: none}"))[1:]) == 9
    load(tmp_path, GOOD, {"resources.evaluate.gpu": 1})  # config.yaml's, for every experiment on this machine
    recipe = load(tmp_path, "recipe: r\n" + overridden, r="{method.lora.rank: 4}")  # recipes are ready-made
    assert recipe.runs["a"].method.lora.rank == 4
