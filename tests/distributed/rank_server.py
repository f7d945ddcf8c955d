"""Starts ranks without paying for their imports each time: a fork of this process for every rank of every launch.

For machines without a GPU; elsewhere torchrun starts the ranks (see launch.py). A line of stdin is JSON: {"world_size",
"folder", "timeout"}; the ranks run FOLDER/jobs.json (see jobs.py) in the environment that torchrun would give them, and
what they print goes to FOLDER/rank_R.txt. The answer is a line that says how the first of them to fail ended, or an
empty one.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from tests.distributed.jobs import main


def launch(world_size: int, folder: str, timeout: float) -> str:
    """Fork the ranks and wait for all; those left are killed when one fails, time is up or the tests have ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    gc.freeze()  # the collector would touch, and so copy, every page that is shared
    ranks = {
        fork({**meeting, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world_size)}, Path(folder)): r
        for r in range(world_size)
    }
    deadline, tests = time.monotonic() + timeout, os.getppid()
    try:
        while ranks:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process:
                rank, code = ranks.pop(process), os.waitstatus_to_exitcode(status)
                if code:
                    return f"rank {rank} ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
            elif time.monotonic() > deadline or os.getppid() != tests:
                return f"ranks {sorted(ranks.values())} were not done after {timeout:g} s"
            else:
                time.sleep(0.02)
    finally:
        for process in ranks:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return ""


def fork(environment: dict[str, str], folder: Path) -> int:
    """The process id of a new rank, which runs the jobs of `folder` and never returns."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ.update(environment)
        output = os.open(folder / f"rank_{environment['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        main(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        print(launch(**json.loads(line)), flush=True)
