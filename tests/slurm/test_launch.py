"""The launcher on a real cluster, with ranks that hold no model: whose they are, how they fail, how they stop."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest
from dayzero.files import read_json

from tests.slurm.conftest import Site
from tests.workflow.project import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def submit(site: Site, folder: Path, world_size: int, nodes: int, mode: str, *asked: str) -> str:
    """Start `world.py` as a batch job; its id."""
    folder.mkdir(exist_ok=True)
    command = f"{sys.executable} -m tests.slurm.world {folder} {world_size} {nodes} {mode}"
    environment = f"ALL,PYTHONPATH={folder}:{ROOT}/workflow:{ROOT},OMP_NUM_THREADS=1,PATH={site.environment['PATH']}"
    arguments = ["--parsable", f"--output={folder}/printed.txt", f"--export={environment}", *asked]
    return site.cluster.call("sbatch", *arguments, "--wrap", command).strip()


def launchers(folder: Path) -> int:
    """How many nodes' launchers of the job with that folder there are; the nodes are this machine."""
    commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return sum(command[1:3] == ["-m", "dayzero.engine.node"] and str(folder) in command for command in commands)


def said(site: Site, folder: Path) -> dict[str, object]:
    site.wait((folder / "said.json").exists, "the launcher's last word")
    return read_json(folder / "said.json")


def test_two_nodes_with_two_ranks_each_of_which_one_fails(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "fail"
    submit(site, folder, 4, 2, "fail", "--nodes=2", "--ntasks-per-node=2", "--gres=gpu:2")
    assert said(site, folder) == {"error": "rank 2: the third rank's mistake"}
    places = [(folder / f"rank{i}").read_text() for i in range(4)]
    assert sorted(places) == ["0 node1", "0 node2", "1 node1", "1 node2"]
    for i in range(4):
        assert f"rank {i} of 4" in (folder / f"ranks/rank_{i}.log").read_text()
    printed = (folder / "printed.txt").read_text()
    assert printed.rstrip().endswith("ValueError: the third rank's mistake")
    assert not list(folder.glob(".launch-*"))


def test_a_signal_from_slurm_stops_all_nodes_and_two_jobs_do_not_meet(site: Site, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    asked = ("--nodes=2", "--ntasks-per-node=2", "--mem=1000")
    jobs = [submit(site, folder, 2, 2, "wait", *asked) for folder in (first, second)]
    site.wait(lambda: all((f / f"rank{i}").exists() for f in (first, second) for i in (0, 1)), "four ranks")
    site.cluster.call("scancel", "--signal=USR1", jobs[0])
    assert said(site, first) == {"finished": False}
    assert not (second / "said.json").exists()
    site.cluster.call("scancel", "--signal=USR1", jobs[1])
    assert said(site, second) == {"finished": False}


def test_a_signal_before_the_launchers_can_heed_it(site: Site, tmp_path: Path) -> None:
    """SLURM may send it while Python still starts on the nodes, or torch is imported there. Before the processes are
    there it cannot reach them, and is lost."""
    said_by = []
    for number, late in enumerate((0.0, 0.3, 1.0, 3.0)):
        folder = tmp_path / str(number)
        job = submit(site, folder, 2, 2, "wait", "--nodes=2", "--ntasks-per-node=2", "--mem=1000")
        site.wait(lambda folder=folder: launchers(folder) == 2, "a launcher on each node")
        time.sleep(late)
        site.cluster.call("scancel", "--signal=USR1", job)
        said_by.append(said(site, folder))
    assert said_by == [{"finished": False}] * 4


def test_a_world_that_slurm_did_not_give(site: Site, tmp_path: Path) -> None:
    submit(site, tmp_path / "nodes", 4, 2, "end", "--nodes=1", "--ntasks-per-node=2", "--mem=1000")
    error = str(said(site, tmp_path / "nodes")["error"])
    assert "make 4 processes on 2 nodes (resources.train.nodes), but SLURM gave job" in error
    assert "1 nodes (node1)" in error or "1 nodes (node2)" in error


def test_a_node_that_does_not_see_the_folder_and_one_whose_clock_is_wrong(site: Site, tmp_path: Path) -> None:
    """The two jobs run beside each other: a node looks 45 s for the folder."""
    unseen, late = tmp_path / "unseen", tmp_path / "late"
    asked = ("--nodes=2", "--ntasks-per-node=2", "--mem=1000")
    for folder in (unseen, late):
        folder.mkdir()
    stand_in = "import os, time\nif os.environ.get('SLURMD_NODENAME') == 'node2':\n"
    stand_in += "    now = time.time\n    time.time = lambda: now() - 90\n"
    (late / "sitecustomize.py").write_text(stand_in)
    site.cluster.kill_node("node2")
    try:
        site.cluster.start_node("node2", hidden=unseen)
    except RuntimeError as error:
        pytest.skip(f"cannot hide a folder from a node: {error}")
    try:
        for folder in (unseen, late):
            submit(site, folder, 2, 2, "end", *asked)
        assert said(site, late) == {"finished": True}
        assert "the clock of node2 differs by -90 s from that of" in (late / "printed.txt").read_text()
        error = str(said(site, unseen)["error"])
        assert f"results_dir: node2 does not see {unseen} as the first node does: put results_dir on a file" in error
        assert not (unseen / "rank0").exists()
    finally:
        site.cluster.kill_node("node2")
        site.cluster.start_node("node2")
