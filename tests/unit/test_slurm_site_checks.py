"""What a site has not is refused before the first job; its commands are stand-ins."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import snakemake_executor_plugin_slurm as plugin
from dayzero.config import RunConfig
from dayzero.errors import ConfigError
from dayzero.experiment import Experiment
from dayzero.slurm_plugin import states_query
from dayzero.slurm_site import check_site, partitions
from dayzero.snakemake_resources import Site
from dayzero.wiring import Wiring

from tests.unit.slurm_requests import wiring

SINFO = (
    "cpu|(null)|2-00:00:00|4\ngpu|gpu:a100:2(S:0-1)|1:00:00|1\ngpu|gpu:a100:4|1:00:00|2\nany|gpu:2,mps:8|infinite|9\n"
)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with commands that say what is in files: no cluster can be without accounts and with them."""
    says = {"sinfo": SINFO, "sbatch": "", "sacctmgr": "mine\nours\n", "sacct": ""}
    for name, text in says.items():
        (tmp_path / f"{name}.txt").write_text(text)
        (tmp_path / name).write_text(f'#!/bin/sh\nwhile read -r l; do echo "$l"; done < {tmp_path}/{name}.txt\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def checked(
    site: Site, account: str = "", overwritten: dict[str, dict[str, object]] | None = None, **values: object
) -> SimpleNamespace:
    settings = SimpleNamespace(status_command="sacct")
    check_site(wiring(**values), site, account, settings, overwritten)
    return settings


SITE = Site(cpu_partition="cpu", gpu_partition="gpu", gpu_request="gres")


def test_a_site_that_has_all_that_is_asked(cluster: Path) -> None:
    values = {"parallelism": {"dp_shard": 8}, "resources": {"train": {"nodes": 2, "gpu": 4, "runtime": 60}}}
    assert checked(SITE, "ours", **values).status_command == "sacct"
    assert partitions()["any"].limit is None


@pytest.mark.parametrize(
    ("site", "account", "train", "says"),
    [
        ({"gpu_partition": "gpuu"}, "", {}, "gpu_partition = 'gpuu' .*: no such partition; did you mean gpu?"),
        ({"cpu_partition": "xyzzy"}, "", {}, "cpu_partition = 'xyzzy' .*: no such partition; there are cpu, gpu, any"),
        ({}, "theirs", {}, "slurm_account = 'theirs' .*: not one of yours, which are mine, ours"),
        ({}, "", {"gpu": 8, "runtime": 60}, "train asks for 8 GPUs of a node, but the nodes of partition gpu have 4"),
        ({}, "", {"gpu": 2, "nodes": 4, "runtime": 60}, "nodes is 4, but partition gpu has 3"),
        ({}, "", {"gpu": 4, "nodes": 2}, "runtime is 240 minutes, but partition gpu ends jobs after 60"),
    ],
)
def test_what_a_site_has_not(
    cluster: Path, site: dict[str, str], account: str, train: dict[str, int], says: str
) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")) as refused:
        checked(replace(SITE, **site), account, parallelism={"dp_shard": 8}, resources={"train": train})
    assert "\n" not in str(refused.value)


def test_stages_that_runs_share_are_held_against_the_partition_too(cluster: Path) -> None:
    """Each once for its key, with the resources that its job will ask for: those of the first run."""
    long, tokenizer = {"runtime": 5000}, {"tokenizer": {}, "architecture": {"model_type": "llama"}, "source": None}
    base = {"experiment": "exp", "train": {"max_steps": 1}, "data": {"source": "rows.jsonl"}}
    resources = {"tokenize": long, "check_data": long, "fetch": long, "report": long, "evaluate": long}
    runs = {
        name: RunConfig.model_validate({**base, "run": name, **values})
        for name, values in {
            "a": {"model": {"source": "hf:org/m"}, "resources": resources},
            "b": {"model": {"source": "hf:org/m"}, "resources": {"tokenize": {"runtime": 6000}}},
            "c": {"model": tokenizer, "method": {"name": "pretrain"}, "resources": {"tokenize": {"runtime": 7000}}},
        }.items()
    }
    with pytest.raises(ConfigError) as refused:
        check_site(Wiring(Experiment("exp", "", runs), "results"), SITE, "", SimpleNamespace())
    assert [line.partition(" minutes")[0] for line in str(refused.value).splitlines()] == [
        "run a: resources.check_data.runtime is 5000",
        "run c: resources.tokenize.runtime is 7000",
        "run a: resources.tokenize.runtime is 5000",
    ]


@pytest.mark.parametrize(
    ("number", "who"), [(1, "run r0"), (3, "runs r0, r1, r2"), (200, r"runs r0 \.\.\. r199 \(200\)")]
)
def test_the_same_mistake_of_many_runs_is_one_line(cluster: Path, number: int, who: str) -> None:
    base = {"experiment": "e", "model": {"source": "hf:org/m"}, "data": {"source": "rows.jsonl"}}
    base |= {"train": {"max_steps": 1}, "parallelism": {"dp_shard": 8}}
    base["resources"] = {"train": {"gpu": 8, "nodes": 1, "runtime": 600}}
    runs = {f"r{i}": RunConfig.model_validate({**base, "run": f"r{i}"}) for i in range(number)}
    with pytest.raises(ConfigError) as refused:
        check_site(Wiring(Experiment("e", "", runs), "results"), SITE, "", SimpleNamespace())
    gpus, runtime = str(refused.value).splitlines()
    assert re.match(f"{who}: resources.train asks for 8 GPUs of a node", gpus)
    assert re.match(f"{who}: resources.train.runtime is 600 minutes", runtime)


def test_what_a_profile_replaces_is_its_own_affair(cluster: Path) -> None:
    """A rule's own partition and time are not held against the partition of the others; partitions may be several."""
    values = {"parallelism": {"dp_shard": 8}, "resources": {"train": {"gpu": 8}}}
    checked(SITE, overwritten={"train": {"slurm_partition": "any", "runtime": 1440}}, **values)
    checked(replace(SITE, gpu_partition="gpu,any"), resources={"train": {"gpu": 2, "runtime": 600}})
    with pytest.raises(ConfigError, match=r"set-resources train: slurm_extra would replace .*: set it for all rules"):
        checked(SITE, overwritten={"train": {"slurm_extra": "--exclusive"}})
    assert checked(SITE, "MINE,ours").status_command == "sacct"
    with pytest.raises(ConfigError, match="slurm_account = 'theirs'"):
        checked(SITE, "mine,theirs")
    (cluster / "sacctmgr").write_text("#!/bin/sh\nexit 1\n")
    checked(SITE, "mine")  # sacct answers, so there are accounts, which this user may not list


def test_half_an_hour_is_no_thirty_hours(cluster: Path) -> None:
    (cluster / "sinfo.txt").write_text("debug|gpu:4|30:00|2\nlong|gpu:4|1-12:00:00|2\n")
    assert (partitions()["debug"].limit, partitions()["long"].limit) == (1800, 129600)


def test_an_end_that_squeue_forgets_too_soon(cluster: Path, caplog: pytest.LogCaptureFixture) -> None:
    (cluster / "sacct").write_text("#!/bin/sh\nexit 1\n")
    for age, warned in ((120, True), (300, False)):
        (cluster / "scontrol").write_text(f"#!/bin/sh\necho 'MinJobAge               = {age} sec'\n")
        (cluster / "scontrol").chmod(0o755)
        caplog.clear()
        assert checked(SITE).status_command == "squeue"
        assert ("MinJobAge" in caplog.text) == warned


def test_states_that_sacct_writes_in_several_words(cluster: Path) -> None:
    """As the plugin runs the command, which knows a state by one word, and a task by the array's id and its number."""
    (cluster / "sacct.txt").write_text("7|CANCELLED by 1000\n8_1|COMPLETED\n8_2|CANCELLED by 0\n")
    (cluster / "sed").symlink_to("/usr/bin/sed")
    command = shlex.split(states_query("a run"))
    environment = {"PATH": str(cluster)}
    done = subprocess.run(["/bin/sh", *command[1:]], env=environment, text=True, capture_output=True)
    assert done.stdout.splitlines() == ["7|CANCELLED", "8_1|COMPLETED", "8_2|CANCELLED"]
    (cluster / "sacct").write_text("#!/bin/sh\nexit 3\n")
    assert subprocess.run(["/bin/sh", *command[1:]], env=environment, capture_output=True).returncode == 3


def test_a_cluster_without_accounts(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the executor, which looks for a sacct and falls back to it, is told of none."""
    monkeypatch.setattr(plugin, "is_query_tool_available", lambda _: True)
    assert checked(SITE).status_command == "sacct"
    assert plugin.is_query_tool_available("sacct")
    for name in ("sacct", "sacctmgr"):
        (cluster / name).write_text("#!/bin/sh\nexit 1\n")
    assert checked(SITE).status_command == "squeue"
    assert not plugin.is_query_tool_available("sacct")
    assert plugin.is_query_tool_available("squeue")
    with pytest.raises(ConfigError, match=r"slurm_account = 'mine' .*: this cluster keeps no accounts"):
        checked(SITE, "mine")


def test_no_slurm_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch is not on PATH: start on a login node"):
        checked(SITE)
