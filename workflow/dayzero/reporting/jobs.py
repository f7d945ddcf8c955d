"""The report's table of SLURM jobs: where each stage ran, what it used, and every start that a training took."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from dayzero.reporting.collect import Record, Run
from dayzero.reporting.facts import DASH, Table, duration, number, text, unit

HEADER = ["run", "stage", "job", "nodes", "GPUs", "started (UTC)", "time", "GPU hours", "requeues", "energy", "end"]


def jobs_table(runs: Sequence[Run]) -> Table | None:
    """A row for each stage that ran in a SLURM job, for training one for each start; None where there are no jobs.

    A stage of the store is shown with the first run that uses it.
    """
    rows, seen = [], set()
    for run in runs:
        for stage, record in run.stages():
            made = record.get("provenance") or {}
            job = made.get("slurm")
            attempts = [a for a in record.get("attempts") or [] if a.get("job_id")]
            if attempts and job:  # measured to the training's end, where the attempt's is of a minute before
                attempts[-1] = attempts[-1] | {k: v for k, v in job.items() if k == "energy_joules"}
            for attempt in attempts:
                ended = attempt.get("outcome", "finished")  # the last one was still writing its own record
                rows.append(_row(run.name, stage, attempt, datetime.fromtimestamp(attempt["started"], UTC), ended))
            if not job or attempts:
                continue
            identity = (stage, job["job_id"], made.get("started"))
            if identity not in seen:
                seen.add(identity)
                record = {**job, "seconds": made.get("seconds")}
                rows.append(_row(run.name, stage, record, datetime.fromisoformat(made["started"]), "finished"))
    return Table(HEADER, rows, frozenset({4, 6, 7, 8, 9})) if rows else None


def _row(run: str, stage: str, job: Record, started: datetime, ended: str) -> list[str]:
    energy = job.get("energy_joules")
    return [
        run,
        stage,
        text(job["job_id"]),
        text(job.get("nodes") or DASH),
        number(job.get("gpus")),
        f"{started:%Y-%m-%d %H:%M:%S}",
        duration(job.get("seconds")),
        number(job.get("gpu_hours"), 2),
        number(job.get("requeues")),
        unit(energy / 3.6e6 if energy else None, "kWh", 2),
        ended,
    ]
