"""One node's part of a world over several nodes: started once on each node by srun, it starts that node's ranks.

Before any rank it makes sure that the results are on a file system that all nodes share, that the clocks agree and that
the named network interface exists; what is wrong it says in one line.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import textwrap
import time
import traceback
from pathlib import Path
from typing import Any

import psutil

from dayzero.console import setup_logging
from dayzero.engine.launch import (
    EXIT_INTERRUPTED,
    RANK_LOGS,
    RankFailed,
    RankKilled,
    StoppedEarly,
    first_report,
    leave_report,
    run_torchrun,
)
from dayzero.engine.launch_nodes import NODE_ERROR, NODE_WARNING, PART
from dayzero.engine.signals import never_ended_by_a_stop
from dayzero.errors import ConfigError, one_line

SHARED_WITHIN = 45.0
"""Seconds a shared file system may take to show another node's new file."""
CLOCKS_WITHIN = 5.0
"""Seconds by which clocks may differ without a word."""
NOTICED_WITHIN = 0.5
"""Seconds in which a killed rank is noticed: it comes before the errors of those who missed it, and after the error for
which SLURM killed the others."""
JOIN_SECONDS = 600
"""How long the first node waits for the last one."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dayzero.engine.node", description=__doc__)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True, help="on each node")
    parser.add_argument("--endpoint", required=True, help="host:port of the first node")
    parser.add_argument("--id", required=True)
    parser.add_argument("--meeting", type=Path, required=True, help="a folder that all nodes share")
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--network-interface")
    parser.add_argument("command", nargs="+", metavar="MODULE [ARGUMENT...]")
    args = parser.parse_args(argv)
    setup_logging("train")
    number = os.environ.get("SLURM_NODEID", "0")
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    try:
        check_shared(args.meeting, name)
        if warning := clock_warning(args.meeting, number, name):
            _print(f"{NODE_WARNING}{warning}")
        if args.network_interface:
            use_interface(args.network_interface, name)
        os.environ[RANK_LOGS] = str(args.logs)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # pages of C++ frames when the other side has ended
        rendezvous = [f"--nnodes={args.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={args.endpoint}"]
        is_host = int(number == "0")
        rendezvous += [f"--rdzv-id={args.id}", f"--rdzv-conf=is_host={is_host},join_timeout={JOIN_SECONDS}"]
        module, *arguments = args.command
        if not run_torchrun(module, arguments, args.processes, rendezvous=rendezvous, errors=args.meeting):
            (args.meeting / f"stopped-{number}").touch()
    except StoppedEarly as stop:
        (args.meeting / f"{'early' if stop.sure else 'stopped'}-{number}").touch()
        return EXIT_INTERRUPTED  # no 0: srun ends the other nodes' ranks, which would wait for these
    except RankKilled as error:
        _say(args.meeting, number, f"{name}: {error}", when=time.time() - NOTICED_WITHIN)
        return 1
    except RankFailed as error:
        if first_report(args.meeting) is None:  # on a full disk, say: the rank itself could not say it there
            _say(args.meeting, number, f"{name}: {error}", error.traceback)
        return 1
    except Exception as error:
        _say(args.meeting, number, f"{name}: {one_line(error)}", traceback.format_exc())
        return 1
    return 0


def check_shared(meeting: Path, name: str, seconds: float = SHARED_WITHIN) -> None:
    """Raise ConfigError where this node does not see what the first node has just written."""
    end = time.monotonic() + seconds
    while not (meeting / "probe.json").is_file():
        if time.monotonic() > end:
            raise ConfigError(
                f"results_dir: {name} does not see {meeting.parent.resolve()} as the first node does: put results_dir "
                "on a file system that all nodes share"
            )
        time.sleep(min(0.5, seconds / 5))


def clock_warning(meeting: Path, number: str, name: str) -> str | None:
    """A line where this node's clock differs from the first node's, both held against the file server's."""
    first = json.loads((meeting / "probe.json").read_text())
    file = meeting / f"clock-{number}"
    file.write_text("")
    difference = time.time() - file.stat().st_mtime - first["clock_offset"]
    if abs(difference) <= CLOCKS_WITHIN:
        return None
    return (
        f"the clock of {name} differs by {difference:+.0f} s from that of {first['host']}: times in logs and metrics "
        "are off by that much; ask for the nodes' clocks to be synchronised (NTP)"
    )


def use_interface(interface: str, name: str) -> None:
    """Tell NCCL and gloo to use this network interface. Raises ConfigError where the node has none of that name."""
    there = sorted(psutil.net_if_addrs())
    if interface not in there:
        raise ConfigError(
            f"resources.train.network_interface {interface}: {name} has {', '.join(there)}: name one that every node "
            "has, or leave it null"
        )
    os.environ["NCCL_SOCKET_IFNAME"] = os.environ["GLOO_SOCKET_IFNAME"] = interface


def _say(meeting: Path, number: str, line: str, text: str = "", when: float | None = None) -> None:
    """Leave this node's error for the first node; where no file can be written, on the line that srun passes on."""
    try:
        leave_report(meeting, f"{int(number)}-node", line, text or line, when)
    except OSError:
        report = {"time": time.time() if when is None else when, "line": textwrap.shorten(line, PART)}
        parts: list[dict[str, Any]] = [report, *({"traceback": text[i : i + PART]} for i in range(0, len(text), PART))]
        for part in parts:
            _print(f"{NODE_ERROR}{json.dumps(part | {'node': int(number)})}")


def _print(line: str) -> None:
    """Write a line at once, beside what else of this node is being printed."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(never_ended_by_a_stop(main))
