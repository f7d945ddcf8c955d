"""What ends a training on a real SLURM cluster besides SLURM: a full disk, a signal, a person, a dead Snakemake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from dayzero.files import read_json

from tests.slurm.conftest import Site
from tests.slurm.faults.asked import go_on, outcomes, restarts
from tests.small_disk import mounted

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture
def small_disk(site: Site) -> Iterator[Path]:
    """A file system of 20 MiB, on which the run `filled` trains."""
    with mounted(site.folder("filled"), "20m") as disk:
        yield disk


def test_a_full_disk(site: Site, curve: list, small_disk: Path) -> None:  # type: ignore[type-arg]
    """The next checkpoint cannot be written: one line says so, and with room again training goes on from the last."""
    process = site.start("--retries", "0", site.summary_file("filled"))
    ranks = site.hold("filled", 7)
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(b"\0" * 4096)
    go_on(ranks)
    code, printed = site.finish(process)
    assert code != 0, printed
    assert "no space left on the disk of" in " ".join(printed.split()), printed
    filler.unlink()
    site.run(site.summary_file("filled"))
    assert read_json(small_disk / "summary.json")["attempts"][-1]["from_step"] == 5
    assert site.curve("filled") == curve


def test_signals_in_the_last_moment_end_nothing(site: Site, curve: list) -> None:  # type: ignore[type-arg]
    """When all is done, and while Python ends: the job would fail, or go back into the queue without its results."""
    process = site.start("--retries", "0", site.summary_file("ended"))
    lock = site.folder("ended") / "lock.json"
    site.wait((site.folder("ended") / "checkpoints/step_24").exists, "the last checkpoint")
    job = site.job_of("ended")

    def over() -> bool:
        site.cluster.call("scancel", "--signal=USR1", job, check=False)
        return not lock.exists()

    site.wait(over, "the training's end", 120)
    code, printed = site.finish(process)
    assert code == 0, printed + site.job_logs()
    assert restarts(site, job) == 0
    assert outcomes(site, "ended") == ["training"]
    assert site.curve("ended") == curve


def test_a_cancelled_job_and_a_rerun(site: Site, curve: list) -> None:  # type: ignore[type-arg]
    process = site.start("--retries", "0", site.summary_file("cancelled"))
    ranks = site.hold("cancelled", 8)
    site.cluster.call("scancel", site.job_of("cancelled"))
    go_on(ranks)
    code, printed = site.finish(process)
    assert code != 0, printed
    site.wait(lambda: not site.ranks("cancelled"), "no rank left", 120)
    site.run(site.summary_file("cancelled"))
    assert outcomes(site, "cancelled")[-1] == "training"
    assert len(outcomes(site, "cancelled")) == 2
    assert site.curve("cancelled") == curve


def test_a_dead_snakemake_and_a_second_one_beside_its_job(site: Site, curve: list) -> None:  # type: ignore[type-arg]
    """The job lives on; a second training of the run is refused, naming the first; the first ends well."""
    process = site.start(site.summary_file("orphaned"))
    ranks = site.hold("orphaned", 6)
    job = site.job_of("orphaned")
    process.send_signal(signal.SIGKILL)
    process.wait()
    command = [sys.executable, "-m", "snakemake", "--unlock"]
    subprocess.run(command, cwd=site.path, env=site.environment, check=True, capture_output=True)
    code, printed = site.finish(site.start("--retries", "0", site.summary_file("orphaned")))
    assert code != 0, printed
    log = (site.folder("orphaned").parent / "logs/train.log").read_text()
    assert f"is being trained by SLURM job {job} on node[1-2], process " in log
    assert all(rank.is_running() for rank in ranks)
    go_on(ranks)
    site.wait(lambda: site.cluster.jobs()[job] == "COMPLETED", "the first job's end", 300)
    assert site.curve("orphaned") == curve
    log = (site.folder("orphaned").parent / f"logs/train-{job}-0.log").read_text()
    assert "processes on each of 2 nodes" in log
    assert "train 24/24" in log
    os.sync()
    assert "Nothing to be done" in site.run(site.summary_file("orphaned"))
