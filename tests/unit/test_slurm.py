"""What is read from SLURM's commands, what is asked of it, and what is refused before any rank starts."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import snakemake_executor_plugin_slurm as plugin
from dayzero import slurm
from dayzero.config import RunConfig
from dayzero.config_checks import impossible
from dayzero.console import setup_logging
from dayzero.engine.launch import RankFailed, _failure, errors_reported, first_report, leave_report
from dayzero.engine.launch_nodes import NodeSettings, check_world, rendezvous_port, run_on_nodes
from dayzero.engine.node import check_shared, clock_warning, use_interface
from dayzero.errors import ConfigError
from dayzero.experiment import Experiment
from dayzero.slurm import Job, parse_job, parse_time
from dayzero.slurm_plugin import states_query
from dayzero.slurm_site import check_site, partitions
from dayzero.snakemake_resources import Site, backoff, job_resources
from dayzero.stages.training import launch
from dayzero.wiring import Wiring
from snakemake_executor_plugin_slurm.validation import get_forbidden_slurm_options, validate_slurm_extra

SHOWN = (
    "JobId=7 JobName=x UserId=me(1) Account=(null) QOS=(null) JobState=RUNNING Reason=None Requeue=1 Restarts=2 "
    "TimeLimit=1-02:03:04 StartTime=2026-11-22T21:54:53 Partition=gpu NodeList=node[1-2] BatchHost=node1 NumNodes=2 "
    "NumCPUs=8 NumTasks=4 "
)


SRUN = """#!/bin/sh
while [ "$1" != --meeting ]; do shift; done
cd "$2"
touch stopped-0
{rank_fails} && echo '{{"time": 1, "line": "a mistake", "traceback": "t"}}' > 3.json
echo '{{"time": 2, "line": "node2: the connection to the store has failed", "traceback": "t"}}' > 1-node.json
exit 1
"""


@pytest.mark.parametrize("rank_fails", [False, True])
def test_a_node_that_lost_its_rendezvous_to_a_stop_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank_fails: bool
) -> None:
    """The first node stopped as asked and left before the second one's launcher: that one finds nobody there."""
    (tmp_path / "srun").write_text(SRUN.format(rank_fails=str(rank_fails).lower()))
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    job, settings, folder = Job(job_id="7", num_nodes=2, nodes="node[1-2]"), NodeSettings(nodes=2), tmp_path / "train"
    if rank_fails:
        with pytest.raises(RankFailed, match="rank 3: a mistake"):
            run_on_nodes("m", [], 4, job, settings, folder=folder, logs=tmp_path / "logs")
    else:
        assert run_on_nodes("m", [], 4, job, settings, folder=folder, logs=tmp_path / "logs") is False


def test_a_job_as_slurm_shows_it() -> None:
    job = parse_job(SHOWN + "TRES=cpu=8,mem=20000M,node=2,billing=8 TresPerNode=gres:gpu:a100:4")
    assert (job.job_id, job.state, job.nodes, job.num_nodes, job.cpus) == ("7", "RUNNING", "node[1-2]", 2, 8)
    assert (job.account, job.partition, job.restarts, job.gpus) == ("", "gpu", 2, 8)
    assert job.time_limit == 93784


@pytest.mark.parametrize(
    ("tres", "gpus"),
    [
        ("TRES=cpu=8 TresPerNode=gres:gpu:2", 4),
        ("TRES=cpu=8 TresPerNode=gres/gpu:2", 4),
        ("TRES=cpu=8,gres/gpu=6 TresPerNode=gres:gpu:2", 6),
        ("TRES=cpu=8 TresPerJob=gres:gpu:3", 3),
        ("TRES=cpu=8", 0),
    ],
)
def test_gpus_however_they_were_asked_for(tres: str, gpus: int) -> None:
    assert parse_job(SHOWN + tres).gpus == gpus


def test_times() -> None:
    assert [parse_time(t) for t in ("00:01:00", "2-00:00:00", "UNLIMITED", "")] == [60, 172800, None, None]


def test_outside_slurm_there_is_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert slurm.current_job() is None


def test_without_its_commands_a_job_has_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    assert slurm.current_job() == Job(job_id="9", num_nodes=0, ends=None)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1790000000")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    assert slurm.current_job() == Job(job_id="9", num_nodes=4, ends=1.79e9)
    assert slurm.job_states(["9"]) is None
    assert "scontrol does not answer" in str(slurm.put_back("9"))


JOB = Job(job_id="7", nodes="node[1-2]", num_nodes=2, gpus=4)


@pytest.mark.parametrize(
    ("nodes", "world_size", "says"),
    [
        (2, 3, "parallelism makes 3 processes, and 3 % nodes 2 = 1, must be 0"),
        (1, 4, r"4 processes on 1 nodes.*, but SLURM gave job 7 2 nodes \(node\[1-2\]\)"),
        (2, 8, "8 processes, but SLURM gave job 7 4 GPUs on 2 nodes.*resources.train.gpu to 4"),
    ],
)
def test_a_world_that_slurm_did_not_give(nodes: int, world_size: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_world(JOB, nodes, world_size)


def test_a_world_that_fits() -> None:
    assert check_world(JOB, 2, 4) == 2
    assert check_world(JOB, 2, 2) == 1
    assert check_world(Job(job_id="7"), 4, 16) == 4  # the controller did not answer: srun will say what is wrong


def test_two_jobs_have_two_ports() -> None:
    assert len({rendezvous_port(str(job)) for job in range(100, 140)}) == 40


def test_results_that_a_node_does_not_see(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"results_dir: node2 does not see .* as the first node does"):
        check_shared(tmp_path / ".launch-7", "node2", seconds=0.05)


@pytest.mark.parametrize(("offset", "says"), [(0.0, None), (-90.0, r"clock of node2 differs by \+90 s from .* first")])
def test_clocks_that_differ(tmp_path: Path, offset: float, says: str | None) -> None:
    (tmp_path / "probe.json").write_text(json.dumps({"clock_offset": offset, "host": "first"}))
    warning = clock_warning(tmp_path, "1", "node2")
    assert warning is None if says is None else re.search(says, warning or "")


def test_network_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
    with pytest.raises(ConfigError, match=r"resources.train.network_interface ib7: node2 has .*"):
        use_interface("ib7", "node2")
    use_interface(sorted(psutil.net_if_addrs())[0], "node2")


@pytest.mark.parametrize("job", [None, Job(job_id="7")], ids=["one machine", "small runs of an allocation"])
def test_the_network_interface_holds_on_one_machine_too(monkeypatch: pytest.MonkeyPatch, job: Job | None) -> None:
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    for name in (*names, "SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(launch, "run_torchrun", lambda *_: [os.environ[name] for name in names])

    def started(interface: str) -> object:
        args = SimpleNamespace(nodes=1, network_interface=interface, stop_before=0)
        return launch._run_ranks(2, args, [], job)

    there = sorted(psutil.net_if_addrs())[0]
    assert started(there) == [there, there]
    with pytest.raises(ConfigError, match=r"resources.train.network_interface ib7: .* or leave it null"):
        started("ib7")


def test_several_nodes_in_a_job_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    args = SimpleNamespace(nodes=2, network_interface=None, stop_before=0)
    with pytest.raises(ConfigError, match=r"resources.train.nodes is 2, but this is a step of job 7.*set gpu_request"):
        launch._run_ranks(2, args, [], Job(job_id="7"))


@pytest.mark.parametrize("in_job", [True, False])
def test_a_killed_rank_of_a_job_has_the_job_s_memory_as_remedy(monkeypatch: pytest.MonkeyPatch, in_job: bool) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if not in_job:
        monkeypatch.delenv("SLURM_JOB_ID")
    said = str(_failure([], {0: 1, 1: -signal.SIGKILL}))
    assert said.startswith("rank 1 was killed by SIGKILL (often the system's answer to too little memory: ")
    assert said.endswith("lower train.local_batch_size)")
    assert ("raise resources.train.mem_mb" in said) == in_job


SRUN_WITH_A_WARNING = """#!/bin/sh
echo "dayzero node warning: the clock of node2 differs" >&2
echo "plain output" >&2
"""


def test_a_node_s_warning_is_in_the_stage_s_log_and_no_lost_start_leaves_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The job's own output is deleted when it succeeds."""
    (tmp_path / "srun").write_text(SRUN_WITH_A_WARNING)
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    folder = tmp_path / "train"
    (folder / ".launch-7-0-99").mkdir(parents=True)
    setup_logging("train", tmp_path / "train.log")
    job = Job(job_id="7", num_nodes=2, nodes="node[1-2]")
    assert run_on_nodes("m", [], 4, job, NodeSettings(nodes=2), folder=folder, logs=tmp_path / "logs")
    assert "WARNING the clock of node2 differs\n" in (tmp_path / "train.log").read_text()
    printed = capfd.readouterr().err
    assert printed.count("the clock of node2 differs") == 1
    assert "plain output" in printed
    assert list(folder.iterdir()) == []


def wiring(**values: object) -> Wiring:
    base = {"experiment": "exp", "train": {"max_steps": 1}, "data": {"source": "rows.jsonl"}}
    run = RunConfig.model_validate({**base, "model": {"source": "hf:org/m"}, "run": "a", **values})
    return Wiring(Experiment("exp", "", {"a": run}), "results")


def asked(stage: str, site: Site, attempt: int = 1, threads: int = 4, **values: object) -> dict[str, object]:
    """The resources of a job, without those that are empty."""
    it = SimpleNamespace(run="a")
    found: dict[str, object] = {}
    for name, value in job_resources(wiring(**values), site, stage).items():
        if not callable(value):
            found[name] = value
            continue
        more = {"attempt": attempt, "threads": threads}
        names = value.__code__.co_varnames[: value.__code__.co_argcount]
        found[name] = value(it, **{k: v for k, v in more.items() if k in names})
    return {k: v for k, v in found.items() if v}


NODES = {"parallelism": {"dp_shard": 8}, "resources": {"train": {"nodes": 2, "gpu": "auto"}}}


@pytest.mark.parametrize(
    ("site", "gpus"),
    [
        ({"gpu_request": "gres"}, {"gres": "gpu:4"}),
        ({"gpu_request": "gres", "gpu_type": "a100"}, {"gres": "gpu:a100:4"}),
        ({"gpu_request": "gpus-per-node", "gpu_type": "h100"}, {"slurm_extra": "--gpus-per-node=h100:4"}),
        ({"gpu_request": "gpus", "gpu_type": "h100"}, {"slurm_extra": "--gpus-per-node=h100:4"}),
    ],
)
def test_gpus_are_asked_for_as_the_site_wants_it(site: dict[str, str], gpus: dict[str, object]) -> None:
    found = asked("train", Site(gpu_partition="g", cpu_partition="c", **site), **NODES)
    assert found["slurm_partition"] == "g"
    assert found["slurm_extra"] == " ".join(filter(None, [str(gpus.pop("slurm_extra", "")), "--signal=USR1@120"]))
    assert {k: found[k] for k in found if k in ("gpu", "gres", "gpu_model")} == gpus
    assert (found["nodes"], found["tasks_per_node"], found["cpus_per_task"], found["mpi"]) == (2, 4, 1, "srun")


@pytest.mark.parametrize("request_by", ["gres", "gpus-per-node", "gpus"])
def test_small_runs_ask_for_gpus_by_number(request_by: str) -> None:
    """Which Snakemake adds up over the runs of an allocation."""
    found = asked("train", Site(gpu_request=request_by, small_runs="true"), resources={"train": {"gpu": 1}})
    assert found["gpu"] == 1
    assert found["slurm_extra"] == "-N1"  # else SLURM may gather the GPUs from several nodes
    validate_slurm_extra(SimpleNamespace(resources=SimpleNamespace(**found)))
    assert not {"gres", "mpi"} & found.keys()


def test_a_sites_own_options_are_added_to_ours() -> None:
    site = Site(gpu_request="gpus", gpu_type="h100", slurm_extra="--exclusive")
    one = asked("train", site, parallelism={"dp_shard": 4}, resources={"train": {"gpu": "auto"}})
    assert (one["gpu"], one["gpu_model"]) == (4, "h100")
    assert one["slurm_extra"] == "--signal=USR1@120 --exclusive"
    assert asked("export", site)["slurm_extra"] == "--exclusive"


def test_cpu_stages_go_to_the_cpu_partition() -> None:
    site = Site(gpu_partition="g", cpu_partition="c", gpu_request="gres")
    assert asked("export", site, **NODES) == {"mem_mb": 6000, "runtime": 60, "slurm_partition": "c"}
    assert asked("train", site)["slurm_partition"] == "c"
    assert (asked("train", site)["tasks_per_node"], asked("train", site)["cpus_per_task"]) == (2, 2)


def test_without_a_slurm_profile_nothing_of_slurm_is_asked_for() -> None:
    assert asked("train", Site(), **NODES) == {"mem_mb": 6000, "runtime": 240, "gpu": 8}


def test_the_plugin_takes_every_extra_option() -> None:
    site = Site(gpu_request="gpus-per-node", gpu_type="a100")
    extra = str(asked("train", site, attempt=3, **NODES)["slurm_extra"])
    assert extra == "--gpus-per-node=a100:4 --signal=USR1@120 --begin=now+120"
    assert not [name for pattern, name in get_forbidden_slurm_options().items() if re.search(pattern, extra)]


def test_each_attempt_waits_longer_but_not_for_ever() -> None:
    assert [backoff(attempt) for attempt in (2, 3, 4, 40)] == [60, 120, 240, 3600]


def test_a_wrong_way_to_ask_for_gpus() -> None:
    with pytest.raises(ConfigError, match=r"gpu_request = 'gpu' .*: use gres, gpus-per-node, gpus"):
        Site(gpu_request="gpu")


@pytest.mark.parametrize(
    ("train", "key", "says"),
    [
        ({"nodes": 3}, "nodes", "4 processes, and 4 % nodes 3 = 1"),
        ({"gpu": 2}, "gpu", "4 processes / nodes 1 = 4 on each node, but gpu is 2"),
        ({"runtime": 2, "stop_before": 120}, "stop_before", "120 s before the end of a job of 2 minutes"),
    ],
)
def test_impossible_machine_settings(train: dict[str, int], key: str, says: str) -> None:
    values = {"parallelism": {"dp_shard": 4}, "train": {"max_steps": 1}, "resources": {"train": train}}
    run = RunConfig.model_validate(
        {"experiment": "e", "run": "a", "model": {"source": "m"}, "data": {"source": "d"}, **values}
    )
    (found,) = [finding for finding in impossible(run) if finding.key.startswith("resources")]
    assert found.key == f"resources.train.{key}"
    assert says in found.message


@pytest.mark.parametrize(
    ("train", "interval"),
    [(None, 200), ({"max_steps": 1000}, 200), ({"max_steps": 40}, 80), ({"max_steps": 20}, None),
     ({"num_epochs": 2.0}, 80)],
)  # fmt: skip
def test_a_limit_below_a_checkpoint_interval(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, train: dict[str, float] | None, interval: int | None
) -> None:
    """A run that ends before its first checkpoint is due has no longer interval than itself."""
    import logging

    from dayzero import attempts
    from dayzero.console import log

    metrics = tmp_path / "train/checkpoints/metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    if train:
        (tmp_path / "config.json").write_text(json.dumps({"train": train}))
    log.propagate = True
    try:
        job = Job(job_id="1", time_limit=60)
        with (
            caplog.at_level(logging.WARNING, logger="dayzero"),
            attempts.recorded(tmp_path / "train", job, 100),
        ):
            time.sleep(0.1)
            step = {"step": 1, "epoch": 0.05, "step_seconds": 2.0, "data_seconds": 0.0, "time": time.time() + 1}
            metrics.write_text(f"{json.dumps(step)}\n" * 3)
            time.sleep(1.3)
    finally:
        log.propagate = False
    assert (f"limit of 60 s is shorter than the {interval} s between two checkpoints" in caplog.text) == bool(interval)
    assert bool(caplog.records) == bool(interval)


def test_the_log_of_an_earlier_or_a_live_start_stays(tmp_path: Path) -> None:
    """Snakemake removes train.log before each start: of a requeued job, and of a second one that is then refused."""
    log_file = tmp_path / "logs/train.log"

    def start(said: str, job: str) -> subprocess.Popen[str]:
        script = f"from dayzero.console import log, setup_logging; setup_logging('train', {str(log_file)!r}); "
        script += f"log.info('{said} begins'); input(); log.info('{said} goes on')"
        environment = {**os.environ, "SLURM_JOB_ID": job}
        environment.pop("DAYZERO_OWN_LOG", None)
        process = subprocess.Popen(
            [sys.executable, "-c", script], env=environment, text=True, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (log_file.exists() and f"{said} begins" in log_file.read_text()):
            time.sleep(0.05)
        return process

    first = start("the first", "23")
    first.communicate("\n", timeout=60)
    log_file.unlink()
    second = start("the second", "23")
    log_file.unlink()
    other = start("the other", "26")
    other.communicate("\n", timeout=60)
    second.communicate("\n", timeout=60)
    said = {
        path.name: re.findall(r"the \w+ (?:begins|goes on)", path.read_text()) for path in log_file.parent.iterdir()
    }
    assert said == {
        "train-23-0.log": ["the first begins", "the first goes on"],
        "train-23-1.log": ["the second begins", "the second goes on"],
        "train-26-0.log": (newest := ["the other begins", "the other goes on", "the second goes on"]),
        "train.log": newest,
    }


def test_a_rank_that_was_started_by_hand_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAYZERO_ERROR_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no"), errors_reported(3):
        raise ValueError("no")
    assert not list(tmp_path.iterdir())


def test_an_error_that_cannot_be_left_where_all_nodes_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAYZERO_ERROR_DIR", f"{tmp_path / 'full'}{os.pathsep}{tmp_path}")
    with pytest.raises(ValueError, match="no"), errors_reported(3):
        raise ValueError("no")
    rank, report = first_report(tmp_path / "full", tmp_path) or ("", {})
    assert (rank, report["line"]) == ("3", "no")
    assert "in test_an_error" in report["traceback"]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        leave_report(tmp_path, "4", "no", "")
    assert [p.name for p in tmp_path.iterdir()] == ["3.json"]


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
