"""One launcher a node: what SLURM gave and what is asked for, ports, clocks, interfaces, whose failure it is."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from dayzero.console import setup_logging
from dayzero.engine.launch import RankFailed, _failure
from dayzero.engine.launch_nodes import NODE_ERROR, NodeSettings, check_world, rendezvous_port, run_on_nodes
from dayzero.engine.node import _say, check_shared, clock_warning, use_interface
from dayzero.errors import ConfigError
from dayzero.slurm import Job
from dayzero.stages.base import run_stage, stage_parser
from dayzero.stages.training import launch

JOB = Job(job_id="7", nodes="node[1-2]", num_nodes=2, gpus=4)

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


BY_USR1 = "srun: error: node2: task 1: User defined signal 1"
BY_TERM = "srun: error: node[1-2]: tasks 0-1: Terminated"
FAILED = "srun: error: node1: task 0: Exited with exit code 1"


@pytest.mark.parametrize(
    ("printed", "code", "left", "stopped"),
    [
        ([BY_USR1, FAILED], 138, "", True),
        ([BY_USR1, FAILED], 138, "0.json", True),  # that rank lost the others to the stop
        ([FAILED], 75, "early-1", True),
        ([FAILED], 75, "early-1 0.json", True),
        ([FAILED], 75, "stopped-1", True),
        ([BY_TERM], 143, "", True),
        ([BY_TERM], 143, "0.json", False),  # SIGTERM is what srun ends the others with
        ([FAILED, BY_TERM], 143, "", False),
        ([FAILED], 1, "0.json", False),
    ],
)
def test_a_stop_before_the_launchers_could_heed_it_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: list[str], code: int, left: str, stopped: bool
) -> None:
    report = '{"time": 1, "line": "a mistake", "traceback": "t"}'
    said = "".join(f"echo '{line}' >&2\n" for line in printed)
    said += "".join(f"echo '{report}' > {name}\n" for name in left.split())
    script = f'#!/bin/sh\nwhile [ "$1" != --meeting ]; do shift; done\ncd "$2"\n{said}exit {code}\n'
    (tmp_path / "srun").write_text(script)
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    job, settings, folder = Job(job_id="7", num_nodes=2, nodes="node[1-2]"), NodeSettings(nodes=2), tmp_path / "train"
    if stopped:
        assert run_on_nodes("m", [], 4, job, settings, folder=folder, logs=tmp_path / "logs") is False
    else:
        with pytest.raises(RankFailed):
            run_on_nodes("m", [], 4, job, settings, folder=folder, logs=tmp_path / "logs")


def test_the_first_error_of_nodes_that_can_write_no_file_comes_last_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a full disk. The launcher's own traceback would hide it. The nodes' lines come between each other's."""
    said = []
    for t in (2, 1):
        _say(tmp_path / "none", str(t), f"node{t}: rank {t}: no", "Traceback\n" + f"  of rank {t}" * 300, when=t)
        said.append(capsys.readouterr().err.splitlines())
        assert max(map(len, said[-1])) <= 1024
    lines = [line for pair in zip(*said, strict=True) for line in pair]
    (tmp_path / "printed").write_text("\n".join(lines))
    (tmp_path / "srun").write_text(f'#!/bin/sh\ncat "{tmp_path}/printed" >&2\nexit 1\n')
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def body(_: object) -> None:
        job, folder = Job(job_id="7", num_nodes=2, nodes="node[1-2]"), tmp_path / "train"
        run_on_nodes("m", [], 4, job, NodeSettings(nodes=2), folder=folder, logs=tmp_path / "logs")

    log_file = tmp_path / "train.log"
    assert run_stage(stage_parser("train", None, config=False), body, ["--log", str(log_file)]) == 1
    *_, first, second, last = log_file.read_text().splitlines()
    assert [first, second] == ["Traceback", "  of rank 1" * 300]
    assert last.endswith("ERROR error: node1: rank 1: no")


def test_an_error_that_srun_passed_on_in_pieces_is_said_as_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "srun").write_text(f"#!/bin/sh\necho 'srun: {NODE_ERROR}{{\"node\": 1, srun: aborted' >&2\nexit 1\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    job, folder = Job(job_id="7", num_nodes=2, nodes="node[1-2]"), tmp_path / "train"
    with pytest.raises(RankFailed, match=r'{"node": 1, srun: aborted'):
        run_on_nodes("m", [], 4, job, NodeSettings(nodes=2), folder=folder, logs=tmp_path / "logs")


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
