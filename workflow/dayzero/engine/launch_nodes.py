"""Training over the nodes of a SLURM job: one `engine.node` on each of them, started by one srun.

This side runs on the job's first node, where the batch script runs. SLURM sends its signals (before the time limit, at
preemption) to the processes that srun started, which pass them on to their ranks.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dayzero.console import log
from dayzero.engine.launch import RankFailed, first_report, signals_passed_on
from dayzero.engine.parallel_dims import SizeError
from dayzero.slurm import Job

FIRST_PORT, NUM_PORTS = 29600, 3000
"""Rendezvous ports: below the ports that Linux hands out by itself (32768 and up)."""

NODE_ERROR = "dayzero node error: "
"""Begins each line with which a node reports an error, in parts, where it cannot do so in a file: see `_add`."""
NODE_WARNING = "dayzero node warning: "
"""Begins a line of a node that belongs in the stage's own log."""
PART = 500
"""Characters of text in a line of those: srun passes on at most 1,024 bytes at once, and others come between."""

TASK_ENDED = re.compile(r"srun: error: \S+: tasks? [\d,-]+: (.*)")
"""What srun says of a node's launcher that did not end by itself with 0."""


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """What a person may set about a world over several nodes."""

    nodes: int = 1
    network_interface: str | None = None
    """Name of the network interface for NCCL and gloo. None: they choose."""


def check_world(job: Job, nodes: int, world_size: int) -> int:
    """Processes on each node. Raises `SizeError`, with both sides' numbers, when the job does not fit the config.

    A job whose nodes SLURM did not tell is not held against it: srun then starts on as many as are asked for, or fails.
    """
    if world_size % nodes:
        raise SizeError(
            "resources.train.nodes",
            f"parallelism makes {world_size} processes, and {world_size} % nodes {nodes} = {world_size % nodes}, must "
            "be 0: every node has the same number of processes",
        )
    processes = world_size // nodes
    if job.num_nodes and job.num_nodes != nodes:
        raise SizeError(
            "parallelism",
            f"the sizes make {world_size} processes on {nodes} nodes (resources.train.nodes), but SLURM gave job "
            f"{job.name} {job.num_nodes} nodes ({job.nodes}): set resources.train.nodes to {job.num_nodes}, or ask "
            f"SLURM for {nodes}",
        )
    if job.gpus and job.gpus < world_size:
        raise SizeError(
            "parallelism",
            f"the sizes make {world_size} processes, but SLURM gave job {job.name} {job.gpus} GPUs on "
            f"{job.num_nodes} nodes ({job.nodes}): set resources.train.gpu to {processes} (or auto), or make the sizes "
            "smaller",
        )
    if job.gpus > world_size:
        log.warning("SLURM gave %d GPUs for %d processes: the others idle", job.gpus, world_size)
    return processes


def rendezvous_port(job_id: str) -> int:
    """A free port of this host, looked for from one that other jobs do not start with: their ids differ."""
    number = int("".join(c for c in job_id if c.isdigit()) or 0)
    for i in range(NUM_PORTS):
        port = FIRST_PORT + (number * 7 + i) % NUM_PORTS
        try:
            socket.create_server(("", port)).close()
            return port
        except OSError:
            continue
    raise RankFailed(f"no free port of {socket.gethostname()} from {FIRST_PORT} to {FIRST_PORT + NUM_PORTS - 1}")


def run_on_nodes(
    module: str, arguments: list[str], world_size: int, job: Job, settings: NodeSettings, *, folder: Path, logs: Path
) -> bool:
    """Run `python -m module arguments` in all ranks of the job; False when they stopped as asked.

    `folder` must be seen by all nodes: errors travel through it, and each node says no before it starts a rank when it
    cannot see it. Each rank's output is in `logs`. Raises `RankFailed` with the first failing rank's error, whose
    traceback is logged last; `SizeError` when world and job differ.
    """
    processes = check_world(job, settings.nodes, world_size)
    for lost in folder.glob(".launch-*"):  # of starts that ended without a word: there is one training at a time
        shutil.rmtree(lost, ignore_errors=True)
    # the same job may start again after a requeue: never find the files of an earlier start
    meeting = folder / f".launch-{job.job_id}-{job.restarts}-{os.getpid()}"
    meeting.mkdir(parents=True)
    logs.mkdir(parents=True, exist_ok=True)
    probe = meeting / "probe.json"
    probe.write_text("{}")
    written = time.time()
    probe.write_text(json.dumps({"clock_offset": written - probe.stat().st_mtime, "host": socket.gethostname()}))
    command = ["srun", f"--nodes={settings.nodes}", f"--ntasks={settings.nodes}", "--ntasks-per-node=1"]
    command += ["--kill-on-bad-exit=1", "--export=ALL"]  # no --unbuffered: pieces of different nodes' lines would mix
    if job.cpus:
        command += [f"--cpus-per-task={max(1, job.cpus // job.num_nodes)}"]
    command += [sys.executable, "-m", "dayzero.engine.node", "--nodes", str(settings.nodes)]
    command += ["--processes", str(processes), "--endpoint", f"{socket.gethostname()}:{rendezvous_port(job.job_id)}"]
    command += ["--id", f"{job.job_id}-{job.restarts}", "--meeting", str(meeting), "--logs", str(logs)]
    command += ["--network-interface", settings.network_interface] if settings.network_interface else []
    command += ["--", module, *arguments]
    where = job.nodes or "which, SLURM did not tell"
    log.info("%d processes on each of %d nodes (%s), job %s", processes, settings.nodes, where, job.name)
    try:
        code, printed, told = _run(command)
        stopped = list(meeting.glob("stopped-*"))
        if code == 0:
            return not stopped
        if _stopped_early(meeting, code, printed, told):
            return False
        if stopped and not any(path.stem.isdigit() for path in meeting.glob("*.json")):
            # no rank failed: the others were ended while they stopped too, or the first node, which stopped before
            # them, took the rendezvous along, and their launchers could only say so
            return False
        if found := first_report(meeting):
            rank, report = found
            who = f"rank {rank}" if rank.isdigit() else "a node"
            log.error("%s failed first; the ranks' output is in %s\n%s", who, logs, report["traceback"].rstrip())
            raise RankFailed(f"{who}: {report['line']}")
        if told:
            report = min(told, key=lambda report: report["time"])
            log.error("the first error; the ranks' output is in %s\n%s", logs, report["traceback"].rstrip())
            raise RankFailed(report["line"])
        raise RankFailed(f"srun ended with code {code}: {printed[-1] if printed else 'it said nothing'}")
    finally:
        shutil.rmtree(meeting, ignore_errors=True)


def _stopped_early(meeting: Path, code: int, printed: list[str], told: list[dict[str, Any]]) -> bool:
    """Whether a request to stop ended a node's ranks or its launcher before they could heed it.

    What others report of that is its consequence. But SIGTERM is what srun sends to the others when one has failed, so
    it counts only where it came first and no error is reported.
    """
    if list(meeting.glob("early-*")):
        return True
    ends = [found[1] for line in printed if (found := TASK_ENDED.search(line))]
    if ends[:1] == [signal.strsignal(signal.SIGUSR1)] or code == -signal.SIGUSR1:
        return True
    by_term = ends[0] == signal.strsignal(signal.SIGTERM) if ends else code in (-signal.SIGTERM, 128 + signal.SIGTERM)
    return by_term and not told and first_report(meeting) is None


def _run(command: list[str]) -> tuple[int, list[str], list[dict[str, Any]]]:
    """Run srun, show what it prints as it comes, and pass requests to stop on to it, and so to every node.

    Its exit code, its last lines, and the errors that nodes report on them.
    """
    last: deque[str] = deque(maxlen=200)
    told: dict[int, dict[str, Any]] = {}
    try:
        with signals_passed_on() as asked:
            if asked:
                return -signal.SIGUSR1, [], []
            # its own session: what a terminal or a batch system sends to our group must not end srun before the ranks
            process = subprocess.Popen(
                command, text=True, errors="replace", stderr=subprocess.PIPE, start_new_session=True
            )

            def show() -> None:
                assert process.stderr
                for line in process.stderr:
                    if line.startswith(NODE_WARNING):
                        log.warning("%s", line.removeprefix(NODE_WARNING).rstrip())
                        continue
                    line, its_own, part = line.partition(NODE_ERROR)
                    if its_own:
                        _add(told, part)
                    sys.stderr.write(line)
                    sys.stderr.flush()
                    if line.strip():
                        last.append(line.rstrip())

            reader = threading.Thread(target=show, daemon=True)
            reader.start()
            if asked:  # while srun was being started
                process.send_signal(signal.SIGUSR1)
            code = process.wait()
            reader.join(5)
    except FileNotFoundError as error:
        raise RankFailed("srun is not on PATH in this job: load the site's SLURM module in the job too") from error
    return code, list(last), list(told.values())


def _add(told: dict[int, dict[str, Any]], text: str) -> None:
    """Add a part of a node's report: {"node": number, "time": when, "line": what} first, then its traceback's pieces.

    A part that did not come whole is a report by itself, as it came.
    """
    try:
        part: dict[str, Any] = json.loads(text)
    except ValueError:
        part = {"node": -1 - len(told), "time": time.time(), "line": text.strip()}
    report = told.setdefault(part.pop("node"), {"time": math.inf, "line": "", "traceback": ""})
    report["traceback"] += part.pop("traceback", "")
    report |= part
