"""What SLURM says about jobs, asked through its own commands; without SLURM there is nothing to say."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime

SECONDS = 20
"""How long a command of SLURM may take before it counts as not answering."""

ATTEMPTS, WAIT_SECONDS = 3, 5.0
"""How often this job is asked for, and how long to wait in between."""

ALIVE = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "REQUEUED", "RESIZING", "SIGNALING"}
"""States of a job that runs or may yet run."""


SHARED_BY = "DAYZERO_SHARED_BY"
"""Environment variable: how many small runs share this job, where several do (`slurm_groups`)."""


class SlurmError(ValueError):
    """SLURM did not answer as needed; the message is its own last line."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job as `scontrol show job` tells it."""

    job_id: str
    array_task: str = ""
    """ARRAY_TASK of a task of an array; the id of one of them is the whole array's too."""
    state: str = ""
    nodes: str = ""
    """SLURM's short list of them, e.g. node[1-4]."""
    num_nodes: int = 0
    """0: not told."""
    cpus: int = 0
    """CPUs of the whole job. 0: not told."""
    gpus: int = 0
    """GPUs of the whole job; where runs share it, one's share."""
    partition: str = ""
    account: str = ""
    restarts: int = 0
    """How often it was put back into the queue."""
    started: str = ""
    """When its nodes were given to it, as SLURM writes it."""
    time_limit: float | None = None
    """Seconds. None: no limit."""
    ends: float | None = None
    """When the time limit ends it, by this node's clock. None: not told."""

    @property
    def name(self) -> str:
        """What SLURM's commands call this job alone: the last task of an array has the whole array's `job_id`."""
        return self.array_task or self.job_id

    @property
    def began(self) -> float | None:
        """`started` by this node's clock: what is paid for counts from there. None: not told."""
        return _moment(self.started)


def current_job() -> Job | None:
    """The job this process runs in; None outside SLURM. Where SLURM's commands tell nothing of it, what the environment
    does: at least an id."""
    job_id = os.environ.get("SLURM_JOB_ID")
    if not job_id:
        return None
    for attempt in range(ATTEMPTS):  # a controller that is restarted, or busy, answers a moment later
        if attempt:
            time.sleep(WAIT_SECONDS)
        try:
            job = _shown(job_id)
            return replace(job, gpus=job.gpus // int(os.environ.get(SHARED_BY) or 1))
        except SlurmError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                break
    end = os.environ.get("SLURM_JOB_END_TIME", "")  # in every step since SLURM 23.02
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return Job(
        job_id=job_id,
        array_task=f"{array}_{task}" if array and task else "",
        nodes=os.environ.get("SLURM_JOB_NODELIST", ""),
        num_nodes=int(os.environ.get("SLURM_JOB_NUM_NODES") or 0),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        ends=float(end) if end.isdigit() else None,
    )


def in_job_step() -> bool:
    """Whether srun started this process, so that it may not start steps over all of the job's nodes."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" in os.environ


def _shown(job_id: str) -> Job:
    lines = ask("scontrol", "show", "job", "-o", job_id).splitlines()
    return parse_job(next((line for line in lines if line.startswith(f"JobId={job_id} ")), "".join(lines[:1])))


def parse_job(text: str) -> Job:
    """A line of `scontrol show job -o`. Raises SlurmError where it is none."""
    fields = dict(part.partition("=")[::2] for part in text.split() if "=" in part)
    if "JobId" not in fields:
        raise SlurmError(f"no job in {text.strip()[:200]!r}")

    def known(name: str) -> str:
        value = fields.get(name, "")
        return "" if value in ("(null)", "N/A", "None", "Unknown") else value

    nodes = int(known("NumNodes").partition("-")[0] or 1)
    return Job(
        job_id=fields["JobId"],
        array_task=f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}" if "ArrayTaskId" in fields else "",
        state=known("JobState"),
        nodes=known("NodeList"),
        num_nodes=nodes,
        cpus=int(known("NumCPUs").partition("-")[0] or 0),
        gpus=_gpus(fields, nodes),
        partition=known("Partition"),
        account=known("Account"),
        restarts=int(known("Restarts") or 0),
        started=known("StartTime"),
        time_limit=parse_time(known("TimeLimit")),
        ends=_moment(known("EndTime")),
    )


def parse_time(text: str) -> float | None:
    """[days-]hours:minutes:seconds in seconds; None where there is no limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+)(?::(\d+))?", text)
    if not found:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _moment(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _gpus(fields: dict[str, str], nodes: int) -> int:
    """GPUs of the job: of what was allocated, or where that is not tracked, of what was asked for."""
    for name in ("AllocTRES", "TRES"):
        if found := re.search(r"gres/gpu=(\d+)", fields.get(name, "")):
            return int(found[1])
    for name, times in (("TresPerJob", 1), ("TresPerNode", nodes)):
        if found := re.search(r"gpu(?:[:=][^:=,]+)?[:=](\d+)", fields.get(name, "")):
            return int(found[1]) * times
    return 0


def job_states(job_ids: Iterable[str]) -> dict[str, str] | None:
    """State of each of the jobs that the queue still knows; None where the queue cannot be asked."""
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}
    try:
        lines = ask("squeue", "--noheader", "--states=all", "--format=%i|%A|%T").splitlines()
    except SlurmError:
        return None
    # a task of an array goes by two ids: 7_3, and one of its own
    found = {job_id: state for *ids, state in (line.strip().split("|") for line in lines) for job_id in ids}
    return {job_id: found[job_id] for job_id in wanted if job_id in found}


def put_back(job_id: str) -> str | None:
    """Put a running job back into the queue under the same id, which ends its processes; else the reason why not."""
    try:
        job = _shown(job_id)
        if job.state != "RUNNING":  # cancelled or preempted: what becomes of it is settled already
            return _how_it_ends(job)
        ask("scontrol", "requeue", job.name)
    except SlurmError as error:
        return str(error)
    return None


def _how_it_ends(job: Job) -> str:
    """Why a job that runs no longer ends. SLURM calls it COMPLETING whatever the reason, while processes of it live."""
    if job.state not in ("COMPLETING", "CANCELLED"):
        return f"it is {job.state}"
    used = (job.ends or time.time()) - job.began if job.began else 0.0
    return "its time is up" if job.time_limit and used >= job.time_limit else "it was cancelled"


def energy_joules(job_id: str) -> int | None:
    """Energy used by the job's running steps; None where the site does not measure it."""
    try:
        lines = ask("sstat", "--allsteps", "--noheader", "--parsable2", "-o", "ConsumedEnergyRaw", "-j", job_id)
    except SlurmError:
        return None
    values = [int(float(line)) for line in lines.split() if re.fullmatch(r"\d+(\.\d+)?", line)]
    return sum(values) or None


def ask(*command: str) -> str:
    """What a command of SLURM prints. Raises SlurmError where it fails, does not answer or is not there."""
    try:
        done = subprocess.run(command, text=True, capture_output=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{command[0]} does not answer ({type(error).__name__})") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise SlurmError(f"{command[0]}: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout
