"""The evaluate stage on a tiny model: exact prompts, right likelihoods, scores that its samples explain."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from dayzero.stages.evaluate import main

from tests.exported import tiny_export

TASKS = Path(__file__).parents[2] / "config" / "tasks"
CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}


def rows(count, offset=0):
    made = []
    for i in range(offset, offset + count):
        completion = json.dumps({"name": "add", "arguments": {"a": i, "b": 2}})
        prompt = f"Call the function.\n\nQuestion: what is {i} + 2? {'é' * i}"
        made.append(
            {
                "id": f"row{i}",
                "prompt": prompt,
                "completion": completion,
                "accepted": json.dumps({"add": {"a": [i], "b": [2]}}),
                "text": f"The quick brown fox number {i} jumps.",
            }
        )
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pd.DataFrame(rows(6)).to_parquet(folder / "test.parquet")
    pd.DataFrame(rows(2, 10)).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_export(tmp_path_factory.mktemp("run") / "model")


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    return tiny_export(tmp_path_factory.mktemp("plain") / "model", chat_template=None)


def run(tmp_path, model, data, evaluate, tasks=TASKS):
    arguments = ["--config", json.dumps({"evaluate": evaluate}), "--model", str(model), "--data", str(data)]
    code = main(
        [*arguments, "--tasks-dir", str(tasks), "--output", str(tmp_path / "eval"), "--log", str(tmp_path / "l")]
    )
    if code:
        return code, None, None
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    samples = [json.loads(line) for line in (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()]
    return code, results, samples


@pytest.fixture(scope="module")
def scored(tmp_path_factory, model, data):
    tasks = ["function_calling", "function_calling_nll", "text_perplexity"]
    return run(
        tmp_path_factory.mktemp("scored"), model, data, {"tasks": tasks, "extra_tasks": ["function_calling_one_shot"]}
    )


def last_line(tmp_path):
    return next(line for line in reversed((tmp_path / "l").read_text().splitlines()) if "error:" in line)


def test_every_task_has_values_errors_and_the_same_items(scored):
    code, results, samples = scored
    assert code == 0
    assert list(results["tasks"]) == [
        "function_calling",
        "function_calling_nll",
        "text_perplexity",
        "function_calling_one_shot",
    ]
    calls = results["tasks"]["function_calling"]
    assert set(calls["metrics"]) == {"correct_call", "right_function", "valid_json"}
    assert calls["metrics"]["correct_call"] == {"value": 0.0, "stderr": 0.0, "higher_is_better": True}
    assert (calls["num_items"], calls["num_fewshot"], calls["version"]) == (6, 0, 1.0)
    assert results["tasks"]["function_calling_one_shot"]["num_fewshot"] == 1
    assert len({task["items_sha256"] for task in results["tasks"].values()}) == 1
    nll = results["tasks"]["function_calling_nll"]["metrics"]
    assert nll["answer_nll"]["stderr"] > 0
    assert nll["answer_nll"]["higher_is_better"] is False
    assert results["tasks"]["text_perplexity"]["metrics"]["bits_per_byte"]["stderr"] is None
    assert results["provenance"]["packages"]["lm-eval"]
    assert len(samples) == 4 * 6


def test_scores_follow_from_the_samples(scored):
    _, results, samples = scored
    for task in ("function_calling", "function_calling_nll", "function_calling_one_shot"):
        for name, metric in results["tasks"][task]["metrics"].items():
            values = [s["metrics"][name] for s in samples if s["task"] == task]
            assert metric["value"] == pytest.approx(sum(values) / len(values), rel=1e-12)
    pairs = [s["metrics"]["bits_per_byte"] for s in samples if s["task"] == "text_perplexity"]
    total, count = sum(p[0] for p in pairs), sum(p[1] for p in pairs)
    value = results["tasks"]["text_perplexity"]["metrics"]["bits_per_byte"]["value"]
    assert value == pytest.approx(-total / count / math.log(2))
    cut = [s["truncated"] for s in samples if s["task"] == "function_calling"]
    assert results["tasks"]["function_calling"]["truncated_share"] == sum(cut) / 6


def test_the_prompt_is_the_training_prompt(scored, model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    first = {s["task"]: s for s in scored[2] if s["doc_id"] == 3}
    row, example = rows(6)[3], rows(1, 10)[0]
    turn = [{"role": "user", "content": row["prompt"]}]
    expected = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert first["function_calling"]["prompt"] == expected
    assert first["function_calling_nll"]["prompt"] == expected
    shown = [
        {"role": "user", "content": example["prompt"]},
        {"role": "assistant", "content": example["completion"]},
        *turn,
    ]
    expected = tokenizer.apply_chat_template(shown, add_generation_prompt=True, tokenize=False)
    assert first["function_calling_one_shot"]["prompt"] == expected


def test_likelihoods_and_answers_equal_plain_transformers(scored, model):
    """Batches, padding and kept logits change nothing: one prompt at a time gives the same."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    for row in rows(6):
        turn = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + answer])
        log_probs = torch.log_softmax(network(ids).logits[0, :-1].float(), -1)
        nll = -log_probs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item()
        scored_nll, answered, text = (
            next(s for s in scored[2] if s["id"] == row["id"] and s["task"] == task)
            for task in ("function_calling_nll", "function_calling", "text_perplexity")
        )
        assert scored_nll["metrics"]["answer_nll"] == pytest.approx(nll, rel=1e-4)
        assert scored_nll["metrics"]["answer_nll_per_byte"] == pytest.approx(nll / len(row["completion"]), rel=1e-4)

        output = network.generate(torch.tensor([prompt]), max_new_tokens=128, do_sample=False)[0, len(prompt) :]
        assert answered["answer"] == tokenizer.decode(output, skip_special_tokens=True)
        assert answered["truncated"] == (tokenizer.eos_token_id not in output)

        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(row["text"], add_special_tokens=False)["input_ids"]]])
        log_probs = torch.log_softmax(network(ids).logits[0, :-1].float(), -1)
        total = log_probs.gather(1, ids[0, 1:, None]).sum().item()
        assert text["metrics"]["bits_per_byte"] == [pytest.approx(total, rel=1e-4), len(row["text"].encode())]


def test_without_a_chat_template_the_prompt_stays_plain(tmp_path, plain_model, data):
    _, results, samples = run(
        tmp_path, plain_model, data, {"tasks": ["function_calling_nll"], "batch_size": 2, "limit": 3}
    )
    assert results["chat_template"] is False
    assert [s["prompt"] for s in samples] == [row["prompt"] for row in rows(3)]
    assert results["tasks"]["function_calling_nll"]["num_items"] == 3


def test_no_tasks_no_model_needed(tmp_path, data):
    code, results, samples = run(tmp_path, tmp_path / "nowhere", data, {})
    assert (code, results["tasks"], samples) == (0, {}, [])


def test_a_task_of_ones_own_with_multiple_choice(tmp_path, model, data):
    """Built-in output types pass through the same model: a shared context is scored once for all choices."""
    own = tmp_path / "tasks"
    own.mkdir()
    (own / "fox.yaml").write_text(
        "task: fox\ndataset_path: parquet\ndataset_kwargs:\n  data_files: {test: '{data}/test.parquet'}\n"
        "  cache_dir: '{cache}'\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: prompt\n"
        "doc_to_choice: ['a', 'b', ' the fox']\ndoc_to_target: 0\nmetadata: {version: 3}\n"
    )
    _, results, samples = run(tmp_path, model, data, {"tasks": ["fox"]}, tasks=own)
    assert set(results["tasks"]["fox"]["metrics"]) == {"acc", "acc_norm"}
    assert (results["tasks"]["fox"]["version"], len(samples)) == (3, 6)
    assert len(samples[0]["answer"]) == 3


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (["function_caling"], ["function_caling", "did you mean function_calling"]),
        (["hellaswag"], ["its data is not on this machine", "load_dataset('Rowan/hellaswag')"]),
        (["text_prompts"], ["column 'passage'", "choose a task"]),
        (["no_file"], ["elsewhere.parquet", "data.test_size"]),
    ],
)
def test_wrong_tasks_are_refused_in_one_line(tmp_path, model, data, tasks, words):
    own = tmp_path / "tasks"
    own.mkdir()
    for file in TASKS.glob("*.yaml"):
        (own / file.name).write_text(file.read_text())
    base = (TASKS / "text_perplexity.yaml").read_text()
    own_text = base.replace("task: text_perplexity", "task: text_prompts").replace("target: text", "target: passage")
    (own / "text_prompts.yaml").write_text(own_text)
    own_file = base.replace("task: text_perplexity", "task: no_file").replace("test.parquet", "elsewhere.parquet")
    (own / "no_file.yaml").write_text(own_file)
    code, _, _ = run(tmp_path, model, data, {"tasks": tasks}, tasks=own)
    assert code == 1
    assert all(word in last_line(tmp_path) for word in words)
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    ("is_local", "remedy"), [(True, "mend its file in config/tasks"), (False, "install what it needs")]
)
def test_a_task_that_does_not_load_is_said_with_a_remedy(is_local, remedy):
    from dayzero.evaluation.tasks import _unloadable

    said = str(_unloadable("fox", KeyError("metric\nlist"), is_local, {}))
    assert "'fox' does not load: KeyError: 'metric" in said
    assert said.endswith(f": {remedy}, or leave the task out")


def test_a_missing_model_is_refused_in_one_line(tmp_path, data):
    code, _, _ = run(tmp_path, tmp_path / "nowhere", data, {"tasks": ["function_calling"]})
    assert code == 1
    assert "run the export stage first" in last_line(tmp_path)


def test_likelihoods_that_ride_along_with_answers_are_the_same(tmp_path, scored, model, data):
    """Scored on their own (nothing is answered here), in small batches, they are what they were beside the answers."""
    _, _, alone = run(tmp_path, model, data, {"tasks": ["function_calling_nll"], "batch_size": 1})
    beside = [s for s in scored[2] if s["task"] == "function_calling_nll"]
    assert len(alone) == len(beside) == 6
    for one, other in zip(alone, beside, strict=True):
        assert one["metrics"]["answer_nll"] == pytest.approx(other["metrics"]["answer_nll"], rel=1e-5)
        assert one["answer"][1] == other["answer"][1]


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_attention_without_copies_is_the_same_attention(length, key_heads):
    import torch
    from dayzero.evaluation.attention import _attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    generator = torch.Generator().manual_seed(0)
    batch, heads, seen, width = 3, 6, 9, 8
    query = torch.randn(batch, heads, length, width, generator=generator)
    key, value = (torch.randn(batch, key_heads, seen, width, generator=generator) for _ in range(2))
    mask = torch.ones(batch, 1, length, seen, dtype=torch.bool)
    mask[1, :, :, :4] = False
    module = torch.nn.Module()
    module.num_key_value_groups = heads // key_heads
    for attention_mask in (mask, None):
        expected, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=0.3)
        result, _ = _attention(module, query, key, value, attention_mask, scaling=0.3)
        assert result.shape == (batch, length, heads, width)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
