"""What is fetched from a hub, models and data sets: a stand-in that speaks its protocol, and the real libraries."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from tests.unit.hub_server import Hub, serve
from tests.unit.test_model_files import edit, make_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    make_model(folder)
    return folder


HUB_WORKER = """
import json, sys
from dayzero.stages import fetch_data, fetch_model
for line in sys.stdin:
    stage, config, output = json.loads(line)
    code = {"data": fetch_data, "model": fetch_model}[stage].main(["--config", json.dumps(config), "--output", output])
    print(code, flush=True)
"""


class HubUser:
    """One process that fetches from the stand-in hub (the libraries read HF_ENDPOINT when imported)."""

    def __init__(self, hub: Hub, home: Path) -> None:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.log = home.with_suffix(".log")
        offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
        env = {k: v for k, v in os.environ.items() if k not in offline} | settings
        self._errors = open(self.log, "w")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", HUB_WORKER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True,
        )  # fmt: skip

    def fetch(self, stage: str, output: Path, **section: Any) -> tuple[int, str]:
        """Exit code and last line of the stage."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([stage, {stage: section}, str(output)]) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        lines = self.log.read_text().strip().splitlines()
        return code, lines[-1] if lines else ""

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._errors.close()


@pytest.fixture(scope="module")
def hub_and_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, HubUser]]:
    with serve() as hub:
        user = HubUser(hub, tmp_path_factory.mktemp("hub") / "home")
        yield hub, user
        user.close()


def test_a_hub_model_and_its_moving_branch(source: Path, tmp_path: Path, hub_and_user: tuple[Hub, HubUser]) -> None:
    hub, user = hub_and_user
    (source / "pytorch_model.bin").write_bytes(b"never downloaded")
    hub.repos["models", "org/tiny"] = {"main": source}
    commit = hub.commit(source)
    assert user.fetch("model", tmp_path / "out", source="hf:org/tiny")[0] == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["revision"], manifest["licence"]) == (commit, "apache-2.0")
    assert "moved_from" not in manifest
    assert not [r for r in hub.requests if "pytorch_model.bin" in r]

    tensors = load_file(source / "model.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, source / "model.safetensors", metadata={"format": "pt"})
    assert user.fetch("model", tmp_path / "out", source="hf:org/tiny")[0] == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["revision"], manifest["moved_from"]) == (hub.commit(source), commit)
    assert f"hf:org/tiny has moved since it was last fetched, from {commit}" in user.log.read_text()

    code, said = user.fetch("model", tmp_path / "no", source="hf:org/tiny@v9")
    assert (code, "org/tiny has no revision 'v9'" in said) == (1, True)
    code, said = user.fetch("model", tmp_path / "no", source="hf:org/none")
    assert (code, "the hub has no model 'org/none'" in said) == (1, True)
    assert not (tmp_path / "no").exists()


def test_a_hub_data_set(tmp_path: Path, hub_and_user: tuple[Hub, HubUser]) -> None:
    hub, user = hub_and_user
    for split, n in (("train", 20), ("test", 5)):
        rows = [{"prompt": f"{split} {i}", "completion": "x"} for i in range(n)]
        file = tmp_path / "repo" / "data" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    hub.repos["datasets", "org/rows"] = {"main": tmp_path / "repo"}
    assert user.fetch("data", tmp_path / "out", source="hf:org/rows", test_source="hf:org/rows")[0] == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {n: s["rows"] for n, s in manifest["splits"].items()} == {"train": 19, "validation": 1, "test": 5}
    assert manifest["sources"][0]["revision"] == hub.commit(tmp_path / "repo")
    for section, said in (
        ({"split": "oops"}, 'Unknown split "oops"'),
        ({"subset": "oops"}, "BuilderConfig 'oops' not found"),
        ({"sha256": "0" * 64}, "pin its commit instead"),
    ):
        code, last = user.fetch("data", tmp_path / "no", source="hf:org/rows", **section)
        assert (code, said in last) == (1, True), last
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("ending", [".jsonl.gz", ".parquet"])
def test_a_streamed_hub_data_set_fetches_only_what_it_reads(
    tmp_path: Path, hub_and_user: tuple[Hub, HubUser], ending: str
) -> None:
    hub, user = hub_and_user
    (tmp_path / "repo").mkdir()
    for shard in range(3):
        rows = [{"prompt": f"{shard}.{i}", "completion": "x"} for i in range(20)]
        file = tmp_path / "repo" / f"train-{shard}{ending}"
        if ending == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        else:
            file.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    hub.repos["datasets", f"org/shards-{ending[1:3]}"] = {"main": tmp_path / "repo"}

    def fetch(name: str, **section: Any) -> tuple[set[str], list[str]]:
        hub.requests.clear()
        assert (
            user.fetch("data", tmp_path / name, source=f"hf:org/shards-{ending[1:3]}", validation_size=0, **section)[0]
            == 0
        )
        read = {r.rpartition("/")[2] for r in hub.requests if r.startswith("GET") and "train-" in r}
        return read, [r["prompt"] for r in pq.read_table(tmp_path / name / "train.parquet").to_pylist()]

    limited, some = fetch("limited", max_rows=25)
    assert limited == {f"train-0{ending}", f"train-1{ending}"}
    streamed, every = fetch("streamed", streaming=True)
    assert streamed == {f"train-{shard}{ending}" for shard in range(3)}
    assert fetch("whole")[1] == every == [f"{shard}.{i}" for shard in range(3) for i in range(20)]
    assert some == every[:25]


def test_a_hub_data_set_that_is_a_script_is_refused(tmp_path: Path, hub_and_user: tuple[Hub, HubUser]) -> None:
    hub, user = hub_and_user
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "repo" / "train.jsonl").write_text('{"text": "a"}\n')
    hub.repos["datasets", "org/script"] = {"main": tmp_path / "repo"}
    for streaming in (False, True):
        code, last = user.fetch("data", tmp_path / "no", source="hf:org/script", streaming=streaming)
        assert (code, "hf:org/script is a script (script.py), which is never run" in last) == (1, True), last
    assert not (tmp_path / "ran").exists()


def test_no_hub_is_said_in_one_line(tmp_path: Path, hub_and_user: tuple[Hub, HubUser]) -> None:
    """The last test of the hub: it stays closed."""
    hub, user = hub_and_user
    hub.close()
    for stage in ("model", "data"):
        code, last = user.fetch(stage, tmp_path / "out", source="hf:org/name")
        assert (code, f"{stage}.source: cannot reach the hub for hf:org/name" in last) == (1, True), last


def test_a_model_with_code_of_its_own_where_it_is_trusted(
    source: Path, tmp_path: Path, hub_and_user: tuple[Hub, HubUser]
) -> None:
    (source / "own_model.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_model'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    edit(source, model_type="own_model", architectures=["OwnModel"], auto_map=auto_map)
    # in the other process, whose cache of such code is a folder of the test
    code, said = hub_and_user[1].fetch("model", tmp_path / "out", source=str(source), trust_remote_code=True)
    assert code == 0, said
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["architecture"] == "OwnModel"
    assert "own_model.py" in manifest["files"]
