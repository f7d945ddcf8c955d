"""The table of failures at the end of a workflow: run, stage, job, reason, and the last line of the stage's log.

Snakemake's own log tells which jobs failed; of a job that failed and then succeeded nothing is said.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dayzero import slurm
from dayzero.slurm_groups import GROUP_FAILED
from dayzero.slurm_plugin import refusal

STAMPED = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ [A-Z]+ ")
"""What begins a line of a stage's log."""

REFUSED = re.compile(
    r"Part of failed array sbatch submission \(tasks (\S+)\)"
    r"|SLURM sbatch failed\. The error message was '(.*?)'\.$"
    r"|(?:Array job|Job) submission failed with exception: (.*?)For further error details",
    re.DOTALL | re.MULTILINE,
)
"""What the executor says of a job that it could not submit."""
REFUSED_ARRAY = re.compile(
    r"sbatch failed for array job submission \(tasks (\S+)\)\. The error message was '(.*?)'\.$",
    re.DOTALL | re.MULTILINE,
)

MESSAGE = re.compile(
    rf"^    message: (?!Error in group )(.*?)^    \w+:|^{GROUP_FAILED} \S+: (.*)", re.DOTALL | re.MULTILINE
)
"""What the executor says of a failed job, or of a group, after Snakemake's own message."""


@dataclass(frozen=True)
class Failure:
    """One job that failed for good."""

    run: str
    stage: str
    job_id: str
    reason: str
    last_line: str


def failures(snakemake_log: Path) -> list[Failure]:
    """The failures that a log of Snakemake tells of, in their order."""
    text = snakemake_log.read_text(encoding="utf-8", errors="replace")
    found: dict[str, Failure] = {}
    reasons = dict(re.findall(r"SLURM-job '([^']+)' failed.*?SLURM status is:\s*'(\w+)'", text, re.DOTALL))
    reasons |= REFUSED_ARRAY.findall(text)
    for part in re.split(r"\n(?=Error in rule |Finished jobid: |    message: Error in group )", text)[1:]:
        if done := re.match(r"Finished jobid: (\d+)", part):
            found.pop(done[1], None)
        elif failed := re.match(r"Error in rule (\w+)", part):
            found[_field(part, "jobid")] = _failure(failed[1], part, reasons)
        else:
            for entry in re.split(r"\n        rule ", part.partition("\n    Error in rule ")[0])[1:]:
                if not _is_finished(entry):
                    found[_field(entry, "jobid")] = _failure(entry.partition(":")[0], part, reasons, entry)
    return list(found.values())


def _failure(stage: str, part: str, reasons: dict[str, str], own: str | None = None) -> Failure:
    log = _field(own or part, "log").partition(" (check")[0].partition(", ")[0]
    path = Path(log)
    run = path.parent.parent.name if path.parent.name == "logs" else ""
    if run in ("store", "") or stage in ("report",):
        run = path.stem.partition("-")[2] or "-"
    job_id = _field(part, "external_jobid") or (_job_of_group(part) if own else "")
    if not job_id and (refused := _refused(part, reasons)):
        return Failure(run, stage, "-", "not submitted", refused)
    reason = reasons.get(job_id) or ((slurm.job_states([job_id]) or {}).get(job_id, "") if job_id else "")
    return Failure(run, stage, job_id or "-", (reason or "failed").lower(), last_line(path) if log else "")


def _job_of_group(part: str) -> str:
    """The SLURM job of a group, which Snakemake tells by its log alone; nothing where it was not submitted."""
    name = Path(_field(part, "log").partition(" (check")[0]).stem
    return name if name.isdigit() else ""


def _is_finished(entry: str) -> bool:
    """Whether a member of a failed group had finished: its outputs were kept (`slurm_groups._keep_finished`)."""
    outputs = [Path(name) for name in _field(entry, "output").split(", ") if name]
    return bool(outputs) and all(path.exists() for path in outputs)


def _refused(part: str, reasons: dict[str, str]) -> str:
    """Why a job could not be submitted; nothing where it was."""
    message = MESSAGE.search(part)
    found = REFUSED.match(message[1] or message[2]) if message else None
    if not found:
        return ""
    tasks, sbatch, other = found.groups()
    return refusal(reasons.get(tasks, found[0]) if tasks else sbatch or other)


def _field(text: str, name: str) -> str:
    found = re.search(rf"^\s+{name}: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def last_line(log: Path) -> str:
    """What a stage said last; a traceback's last line where it had no time for more."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    if not lines:
        return f"{log} has nothing: the job ended before the stage began; its output is in .snakemake/slurm_logs"
    said = [line for line in lines if " ERROR " in line and "error: " in line] or lines
    return STAMPED.sub("", said[-1]).removeprefix("error: ")


def print_failures(snakemake_log: str | Sequence[str]) -> None:
    """Print the table, if there is anything in it. Never fails: it stands at the end of a workflow that already has.

    `snakemake_log`: what Snakemake hands to `onerror`, one path or a list of them.
    """
    paths = [snakemake_log] if isinstance(snakemake_log, str) else snakemake_log
    try:
        rows = [row for path in paths for row in failures(Path(path))]
    except OSError as error:
        print(f"no table of failures: {error}", file=sys.stderr)
        return
    if not rows:
        return
    table = Table(title=f"{len(rows)} failed", title_justify="left")
    for name in ("run", "stage", "job", "reason", "last line of its log"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row.run, row.stage, row.job_id, row.reason, row.last_line)
    console = Console(stderr=True)
    Console(stderr=True, width=None if console.is_terminal else 200).print(table, markup=False)
