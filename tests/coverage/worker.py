"""One rank of the walk: `torchrun -m tests.coverage.worker FOLDER`, with the architectures in FOLDER/todo.json.

Rank 0 writes each architecture's file, FOLDER/NAME.json, after every check, so that what kills a process (an abort, a
collective that never ends) is known to be that check's failure.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from dayzero.console import log
from dayzero.engine import distributed
from dayzero.files import write_json

from tests.coverage.blame import blame
from tests.coverage.checks import CHECKS, Subject, explain, run_check

CHECK_MINUTES = 1.0
"""How long one rank waits for another within a check."""

BROKEN = 3
"""Exit status when a collective failed: the process group is of no use any more."""


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    log.handlers = [logging.NullHandler()]
    torch.use_deterministic_algorithms(True, warn_only=True)
    distributed.TIMEOUT_MINUTES = CHECK_MINUTES
    with distributed.process_group():
        verdicts = dist.new_group(backend="gloo")
        for name in json.loads((folder / "todo.json").read_text()):
            _walk(name, folder, verdicts)


def _walk(name: str, folder: Path, verdicts: dist.ProcessGroup) -> None:
    path = folder / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"cells": {}, "seconds": 0.0}
    distributed.barrier()
    subject = Subject(name, folder / "work" / name)
    started = time.perf_counter()

    def note(**more: Any) -> None:
        if distributed.rank() == 0:
            seconds = round(found["seconds"] + time.perf_counter() - started, 1)
            write_json(path, {**found, "seconds": seconds, **more})

    note(running="build")
    try:
        found["remark"] = subject.make()
        found["cells"]["build"] = {"status": "pass", "why": ""}
    except Exception as error:
        found["cells"]["build"] = {"status": "fail", "why": explain(error)}
    if found["cells"]["build"]["status"] == "pass":
        for check, function in CHECKS.items():
            if check in found["cells"]:
                continue
            note(running=check)
            verdict = _agree(run_check(function, subject), verdicts)
            if verdict["status"] == "fail" and distributed.rank() == 0 and (whose := blame(check, subject)):
                verdict = {"status": "upstream", "why": whose}
            found["cells"][check] = verdict
            note()
            if _broken(verdict["why"]):
                os._exit(BROKEN)
    subject.close()
    note(done=True)


def _agree(verdict: dict[str, str], group: dist.ProcessGroup) -> dict[str, str]:
    """One verdict for all ranks: the first that is no pass, with all remarks."""
    every: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(every, verdict, group=group)
    return next((v for v in every if v["status"] != "pass"), every[0])


def _broken(why: str) -> bool:
    return any(sign in why for sign in ("imed out", "Connection closed", "Connection reset", "Broken pipe"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
