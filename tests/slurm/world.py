"""A stand-in for training in the launcher's tests: the batch script's side and a rank, without a model.

As a script it is the stage on the job's first node: `world.py FOLDER WORLD_SIZE NODES MODE`; torchrun starts it again
as the ranks, which then say who they are and do as MODE says: end, fail, or wait for a request to stop.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def rank(folder: Path, mode: str) -> None:
    from dayzero.engine.launch import EXIT_INTERRUPTED, errors_reported, keep_output
    from dayzero.engine.signals import note_early, noted

    number = int(os.environ["RANK"])
    note_early()
    keep_output()
    print(f"rank {number} of {os.environ['WORLD_SIZE']} on {os.environ['SLURMD_NODENAME']}", flush=True)
    (folder / f"rank{number}").write_text(os.environ["LOCAL_RANK"] + " " + os.environ["SLURMD_NODENAME"])
    with errors_reported(number):
        if mode == "fail" and number == 2:
            end = time.monotonic() + 200  # the others would be ended before they say who they are
            while len(list(folder.glob("rank[0-9]"))) < 4 and time.monotonic() < end:
                time.sleep(0.1)
            raise ValueError("the third rank's mistake")
        if mode in ("fail", "wait"):
            end = time.monotonic() + 200
            while not noted() and time.monotonic() < end:
                time.sleep(0.1)
            sys.exit(EXIT_INTERRUPTED if noted() else 1)


def stage(folder: Path, world_size: int, nodes: int, mode: str) -> None:
    from dayzero import slurm
    from dayzero.console import setup_logging
    from dayzero.engine.launch_nodes import NodeSettings, run_on_nodes
    from dayzero.files import write_json

    setup_logging("train")
    job = slurm.current_job()
    assert job
    try:
        finished = run_on_nodes(
            "tests.slurm.world", sys.argv[1:], world_size, job, NodeSettings(nodes=nodes),
            folder=folder, logs=folder / "ranks",
        )  # fmt: skip
        said = {"finished": finished}
    except ValueError as error:
        said = {"error": str(error)}
    write_json(folder / "said.json", said)


if __name__ == "__main__":
    where, size, count, how = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        rank(where, how)
    else:
        stage(where, size, count, how)
