"""`python -m tests.coverage.walk`: every architecture through the engine, and the table of what came out.

Results are kept by architecture in results/coverage/ and not made again while code and packages are the same, so a walk
can be cut short (--minutes) and continued.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from dayzero.files import write_json

from tests.coverage import table
from tests.coverage.architectures import architectures
from tests.distributed.launch import start_ranks

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "results" / "coverage"
PAGE = REPOSITORY / "docs" / "model-coverage.md"
TWIN = PAGE.with_suffix(".json")
RANKS = 2
PATIENCE = 150
"""Seconds without a new result after which the ranks are ended and the running check has failed."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="only this model_type (may be given several times)")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no architecture after this time")
    parser.add_argument("--again", action="store_true", help="throw away earlier results of what is walked")
    parser.add_argument("--keep", action="store_true", help="use earlier results even of other code or packages")
    parser.add_argument("--failed", action="store_true", help="walk again what has a failure")
    parser.add_argument("--accept", action="store_true", help="write the pages even where something got worse")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    args.results.mkdir(parents=True, exist_ok=True)
    names = args.only or list(architectures())
    stamp = fingerprint()
    todo = []
    for name in names:
        found = read(args.results, name)
        stale = found.get("stamp") != stamp and not args.keep
        failed = any(cell["status"] == "fail" for cell in found.get("cells", {}).values())
        if args.again or stale or (args.failed and failed):
            (args.results / f"{name}.json").unlink(missing_ok=True)
            found = {}
        if not found.get("done"):
            todo.append(name)
    walk(args.results, todo, stamp, time.monotonic() + 60 * args.minutes)
    return report(args.results, names, write=not args.only, accept=args.accept)


def report(folder: Path, names: list[str], *, write: bool, accept: bool) -> int:
    """Hold the results of `names` against the twin and, with `write`, write both pages where nothing is worse or that
    is to be accepted. Returns the exit status."""
    left = [name for name in names if not read(folder, name).get("done")]
    print(f"{len(names) - len(left)} of {len(names)} architectures walked", flush=True)
    if left:
        print("run the command again to continue")
        return 2
    results = {name: read(folder, name)["cells"] for name in names}
    baseline = json.loads(TWIN.read_text())["architectures"] if TWIN.is_file() else {}
    if not write:  # a part of them
        baseline = {name: baseline[name] for name in names if name in baseline}
    worse = table.worse(results, baseline)
    for text in worse:
        print(f"WORSE {text}")
    leaks = [name for name, cells in results.items() if "SILENT LEAK" in cells.get("packing", {}).get("why", "")]
    for name in leaks:
        print(f"LEAK {name}")
    good, total = table.share(results, table.CORE)
    print(f"{good} of {total} ({100 * good / total:.1f} %) pass {', '.join(table.CORE)}")
    if write and (accept or not worse):
        PAGE.write_text(table.page(results, architectures()), encoding="utf-8")
        TWIN.write_text(json.dumps(table.twin(results), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"wrote {PAGE} and {TWIN}")
    return 1 if (worse and not accept) or leaks else 0


def walk(results: Path, names: list[str], stamp: str, deadline: float) -> None:
    """Run all checks of `names`, starting the ranks again whenever an architecture takes them down."""
    while names and time.monotonic() < deadline:
        write_json(results / "todo.json", names)
        log = results / "ranks.log"
        with log.open("w") as output:
            process = start_ranks(RANKS, "tests.coverage.worker", results, output)
        names, why = _watch(process, results, names, stamp, deadline)
        if names and why:
            note_death(results, names[0], why, log, stamp)


def _watch(
    process: subprocess.Popen[bytes], results: Path, names: list[str], stamp: str, deadline: float
) -> tuple[list[str], str]:
    """Wait; print each architecture as it is done. Returns what is left and why the ranks ended before it."""
    last: dict[str, Any] = {}
    changed = time.monotonic()
    while True:
        ended = process.poll() is not None
        found = read(results, names[0]) if names else {}
        while names and found.get("done"):
            write_json(results / f"{names[0]}.json", {**found, "stamp": stamp})
            print(line(names[0], found), flush=True)
            names = names[1:]
            found = read(results, names[0]) if names else {}
            if time.monotonic() > deadline:
                _end(process)
                return [], ""
        if ended:
            return names, f"the ranks ended with status {process.returncode}"
        if found != last:
            last, changed = found, time.monotonic()
        if time.monotonic() - changed > PATIENCE:
            _end(process)
            return names, f"nothing came back within {PATIENCE} s"
        time.sleep(0.3)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End torchrun and its ranks at once: asked to stop, they would write a checkpoint and a failure first."""
    for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def note_death(results: Path, name: str, why: str, log: Path, stamp: str) -> None:
    """Write down the running check of architecture `name` as failed; its other checks are still to be run."""
    found = read(results, name)
    running = found.pop("running", None)
    if running is None and found.get("cells"):
        return  # it failed within the check and says so
    tail = [x.strip() for x in log.read_text(errors="replace").splitlines() if "Error" in x]
    cell = {"status": "fail", "why": f"{why} {' '.join(tail[-1:])}"[:300]}
    cells = {**found.get("cells", {}), running or "build": cell}
    done = running in (None, "build")
    write_json(results / f"{name}.json", {"seconds": 0.0, **found, "cells": cells, "done": done, "stamp": stamp})


def read(results: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((results / f"{name}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def line(name: str, found: dict[str, Any]) -> str:
    """One architecture in the walk's output."""
    bad = [f"{check} {c['status']}: {c['why']}" for check, c in found["cells"].items() if c["status"] != "pass"]
    return f"{name} ({found['seconds']} s) " + ("; ".join(bad) or "all pass")


def fingerprint() -> str:
    """What the results depend on: the engine's and the checks' code, and the libraries."""
    digest = hashlib.sha256()
    for path in sorted([*(REPOSITORY / "workflow/dayzero/engine").glob("*.py"), *Path(__file__).parent.glob("*.py")]):
        digest.update(path.read_bytes())
    return f"{digest.hexdigest()[:16]} " + " ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "peft"))


if __name__ == "__main__":
    sys.exit(main())
