"""The stage fetch_model: what is taken, converted or refused, from directories and GGUF files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dayzero.files import sha256_file
from dayzero.stages import fetch_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
CONFIG = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def make_model(folder: Path, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, **config))
    model.save_pretrained(folder)
    vocabulary = {chr(33 + i): i for i in range(62)} | {"<eos>": 62, "<unk>": 63}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")
    return model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    make_model(folder)
    return folder


def _main(output: Path, source: str | Path, **model: Any) -> int:
    config = json.dumps({"model": {"source": str(source), **model}})
    return fetch_model.main(["--config", config, "--output", str(output)])


def _fetch(output: Path, source: str | Path, **model: Any) -> dict[str, Any]:
    assert _main(output, source, **model) == 0
    return json.loads((output / "manifest.json").read_text())


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.float().eval()(torch.arange(10)[None]).logits


def test_only_the_needed_files_are_taken_and_described(source: Path, tmp_path: Path) -> None:
    (source / "optimizer.pt").write_bytes(b"x")
    (source / "pytorch_model.bin").write_bytes(b"unread, as there is safetensors")
    (source / "modeling.py").write_text("boom")
    (source / "LICENSE").write_text("free")
    manifest = _fetch(tmp_path / "out", source)
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == set(manifest["files"]) | {"manifest.json"}
    assert not files & {"optimizer.pt", "pytorch_model.bin", "modeling.py"}
    assert files >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "LICENSE"}
    for name, digest in manifest["files"].items():
        assert digest == sha256_file(tmp_path / "out" / name)
    model = AutoModelForCausalLM.from_pretrained(source)
    expected = {
        "source": str(source), "revision": None, "licence": "apache-2.0", "num_parameters": model.num_parameters(),
        "dtype": "float32", "architecture": "LlamaForCausalLM", "context_length": 128, "chat_template": True,
    }  # fmt: skip
    assert {k: manifest[k] for k in expected} == expected
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), _logits(model))
    assert (tmp_path / "out" / "model.safetensors").stat().st_nlink == 1, "a link would follow changes to the source"


def test_sharded_weights_and_another_dtype(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    for old in source.glob("*.safetensors"):
        old.unlink()
    model.save_pretrained(source, max_shard_size="20KB")
    (source / "consolidated.safetensors").write_bytes(b"another layout of the same weights")
    assert len(list(source.glob("model-*.safetensors"))) > 1
    manifest = _fetch(tmp_path / "out", source, dtype="bfloat16")
    assert manifest["dtype"] == "bfloat16"
    assert "consolidated.safetensors" not in manifest["files"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stored.dtype == torch.bfloat16
    wanted = model.bfloat16().state_dict()
    assert stored.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in stored.state_dict().items())


def test_tied_weights_are_counted_once(tmp_path: Path) -> None:
    model = make_model(tmp_path / "source", tie_word_embeddings=True)
    assert _fetch(tmp_path / "out", tmp_path / "source")["num_parameters"] == model.num_parameters()


def _pickle(source: Path, content: Any = None) -> None:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors if content is None else content, source / "pytorch_model.bin")


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("attacked",)


def test_pickled_weights_need_a_permission_and_run_no_code_even_then(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    want = _logits(AutoModelForCausalLM.from_pretrained(source))
    _pickle(source)
    assert _main(tmp_path / "out", source) == 1
    assert "set model.allow_pickle: true" in capsys.readouterr().err
    manifest = _fetch(tmp_path / "out", source, allow_pickle=True)
    assert "model.safetensors" in manifest["files"]
    assert "pytorch_model.bin" not in manifest["files"]
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), want)
    torch.save({"a": Attack()}, source / "pytorch_model.bin")
    assert _main(tmp_path / "out2", source, allow_pickle=True) == 1
    assert "not a pickle of tensors only" in capsys.readouterr().err
    assert not (tmp_path / "attacked").exists()
    assert not (tmp_path / "out2").exists()


def test_pickled_shards_with_shared_tensors(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = make_model(source, tie_word_embeddings=True)
    (source / "model.safetensors").unlink()
    state = model.state_dict()
    names = list(state)
    parts = {"pytorch_model-00001-of-00002.bin": [*names[:3], "lm_head.weight"]}
    parts["pytorch_model-00002-of-00002.bin"] = [n for n in names if n not in parts["pytorch_model-00001-of-00002.bin"]]
    for file, part in parts.items():
        torch.save({n: state[n] for n in part}, source / file)
    index = {"metadata": {}, "weight_map": {n: file for file, part in parts.items() for n in part}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    _fetch(tmp_path / "out", source, allow_pickle=True)
    stored, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(_logits(stored), _logits(model))


def edit(source: Path, **fields: Any) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **fields}))


def _bad(case: str, source: Path) -> dict[str, Any]:
    """Spoil the source; returns what else the config says."""
    weights = source / "model.safetensors"
    if case == "remote code":
        edit(source, auto_map={"AutoModelForCausalLM": "modeling.Tiny"})
    elif case == "foreign code":
        edit(source, auto_map={"AutoModelForCausalLM": "org/other--modeling.Tiny"})
        return {"trust_remote_code": True}
    elif case == "tokenizer code":
        tokenizer = json.loads((source / "tokenizer_config.json").read_text())
        (source / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "auto_map": {"AutoTokenizer": "t.T"}}))
    elif case == "unknown type":
        edit(source, model_type="brand_new_lm")
    elif case == "encoder":
        edit(source, model_type="t5", architectures=["T5ForConditionalGeneration"])
    elif case == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif case == "no weights":
        weights.unlink()
    elif case == "missing shard":
        index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    elif case == "adapter":
        (source / "config.json").rename(source / "adapter_config.json")
    elif case == "broken config":
        (source / "config.json").write_text("{")
    elif case == "quantised":
        edit(source, quantization_config={"quant_method": "fp8"})
        return {"dtype": "bfloat16"}
    elif case == "broken tokenizer":
        (source / "tokenizer.json").write_text("{}")
    elif case == "wrong sha256":
        return {"sha256": {"model.safetensors": "0" * 64}}
    elif case == "one sha256":
        return {"sha256": "0" * 64}
    elif case == "unknown file":
        return {"sha256": {"model.bin": "0" * 64}}
    return {}


SAID = {
    "remote code": "asks to run Python code of its own (auto_map): read that code, then set model.trust_remote_code",
    "foreign code": "lies in another repository",
    "tokenizer code": "its tokenizer_config.json asks to run Python code",
    "unknown type": "model_type 'brand_new_lm' with transformers",
    "encoder": "it is not a causal language model",
    "cut weights": "model.safetensors: damaged or cut-off weights",
    "no weights": "no weights: expected model.safetensors",
    "missing shard": "names model-00001-of-00002.safetensors, which is missing",
    "adapter": "it is a PEFT adapter: merge it into its base model first",
    "broken config": "config.json: not valid JSON",
    "quantised": "holds quantised weights, which stay as they are",
    "broken tokenizer": "its tokenizer cannot be loaded",
    "wrong sha256": "model.sha256: ",
    "one sha256": "the model is a directory: give a mapping",
    "unknown file": "'model.bin' is not a file taken from the model",
}


@pytest.mark.parametrize("case", SAID)
def test_bad_models_give_one_line_and_leave_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    more = _bad(case, source)
    assert _main(tmp_path / "store" / "out", source, **more) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fetch_model: error: ")
    assert SAID[case] in last
    assert [p.name for p in (tmp_path / "store").iterdir()] == [".out.lock"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 3}, "its weights lack model.layers.2."),
        ({"intermediate_size": 52}, "do not fit its config.json (model.layers.0.mlp.down_proj.weight is ["),
    ],
)
def test_weights_that_do_not_fit_their_config(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, int], said: str
) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    assert _main(tmp_path / "out", source) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"fetch_model: error: model.source {source}: its weights ")
    assert said in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (b"---\nlicense: mit\n---\n", "mit"),
        (b"---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        (b"---\ntags: [a]\n---\n", None),
        (b"---\nlicense: [\n---\n", None),
        (b"---\n- license\n---\n", None),
        (b"---\nlicense: \xff\n---\n", None),
        (b"# no front matter", None),
        (None, None),
    ],
)
def test_the_licence_of_a_local_model_s_card(source: Path, tmp_path: Path, card: bytes | None, licence: str) -> None:
    (source / "README.md").unlink()
    if card is not None:
        (source / "README.md").write_bytes(card)
    assert _fetch(tmp_path / "out", source)["licence"] == licence


def test_other_files_are_no_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    assert _main(tmp_path / "out", tmp_path / "weights.safetensors") == 1
    assert "give a Hugging Face directory or a .gguf file" in capsys.readouterr().err
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    assert _main(tmp_path / "out", tmp_path / "bad.gguf") == 1
    assert "bad.gguf: not a GGUF file, or cut off" in capsys.readouterr().err


def _write_gguf(file: Path, model: LlamaForCausalLM) -> None:
    """A llama in GGUF's layout, with a byte-level tokenizer."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_license("mit")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = [chr(33 + i) for i in range(60)] + ["AB", "ABC", "<unk>", "<eos>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 62 + [3, 3])
    writer.add_token_merges(["A B", "AB C"])
    writer.add_eos_token_id(63)
    writer.add_bos_token_id(63)
    writer.add_unk_token_id(62)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:  # GGUF keeps rotary pairs side by side
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_a_plain_directory_with_the_same_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    _write_gguf(tmp_path / "tiny.gguf", model)
    manifest = _fetch(tmp_path / "out", tmp_path / "tiny.gguf", dtype="float32")
    assert (manifest["licence"], manifest["context_length"], manifest["chat_template"]) == ("mit", 128, True)
    assert manifest["source_sha256"] == sha256_file(tmp_path / "tiny.gguf")
    assert manifest["num_parameters"] == model.num_parameters()
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(_logits(stored), _logits(model), atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("ABCA") == ["ABC", "A"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "AB"}], tokenize=False) == "AB"
    mode = (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777
    assert mode == (tmp_path / "out" / "manifest.json").stat().st_mode & 0o777


def test_gguf_is_stored_in_bfloat16_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    _write_gguf(folder / "tiny.gguf", LlamaForCausalLM(LlamaConfig(**CONFIG)))
    assert _main(tmp_path / "out", folder, sha256="0" * 64) == 1
    assert "expected " + "0" * 64 in capsys.readouterr().err
    assert _fetch(tmp_path / "out", folder, sha256=sha256_file(folder / "tiny.gguf"))["dtype"] == "bfloat16"
