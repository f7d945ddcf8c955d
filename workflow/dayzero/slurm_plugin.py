"""snakemake-executor-plugin-slurm (2.8), mended.

How it asks sacct for job states: it knows no state but bare words, and sacct says "CANCELLED by 1000": a cancelled job
would be waited for for ever. And it asks for raw ids, in which the last task of an array has the array's own id and the
others ids that nobody was told: each would be judged by the last one's end.

How it falls back: where squeue is asked and one look at MinJobAge gets no answer, it asks sacct, which knows of no job
where there is no accounting: a job that has ended would be waited for for ever.

How it names jobs: by rule and wildcards, which the same run of two experiments has alike.

How it submits: a job that sbatch refuses has failed, and so all its attempts are gone within seconds, though most
refusals pass by themselves. And once a node is lost, no later job may use any node of the job that ran there, though
SLURM itself knows which of them is down.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

from dayzero.console import log

DAYS = 2
"""How far back jobs are looked for, as the plugin does."""

FIRST_WAIT, LONGEST_WAIT = 5.0, 60.0
"""Seconds between two tries of a submission that is refused for now: at first, and after doubling at the longest."""

PATIENCE = 24 * 3600.0
"""Seconds of nothing but such refusals after which one counts: the jobs that fill a limit may train that long."""

OF_EXPERIMENT = "@"
"""Between what the plugin says of a job and its experiment, in the job's comment: in no name of either."""

PASSES = re.compile(
    r"(Max|Grp)Submit|Unable to contact slurm controller|Socket timed out|Resource temporarily unavailable"
    r"|Slurm temporarily unable to accept job",
    re.IGNORECASE,
)
"""Refusals that pass by themselves: a limit on jobs in the queue, a controller that is away or busy."""


def states_query(run_id: str) -> str:
    """The command that prints JOB|STATE for a workflow's jobs, tasks of arrays as JOB_TASK, and fails as sacct does."""
    since = datetime.now() - timedelta(days=DAYS)
    command = ["sacct", "-X", "--parsable2", "--clusters", "all", "--noheader", "--format=JobId,State"]
    command += ["--starttime", f"{since:%Y-%m-%dT%H:00}", "--endtime", "now", "--name", run_id]
    script = f"states=$({shlex.join(command)}) || exit; printf '%s\\n' \"$states\" | sed 's/ by [0-9]*$//'"
    return shlex.join(["sh", "-c", script])


def get_min_job_age() -> int | None:
    """Seconds for which SLURM remembers an ended job; None where it does not say."""
    from snakemake_executor_plugin_slurm.job_status_query import get_min_job_age as asked

    age = asked()
    return None if age is None else int(age)


def mend_sacct() -> None:
    """Let the plugin ask with `states_query`."""
    import snakemake_executor_plugin_slurm as plugin

    plugin.query_job_status_sacct = states_query


def leave_sacct_alone() -> None:
    """Let the plugin never ask sacct, on a cluster where it does not answer."""
    import snakemake_executor_plugin_slurm as plugin

    there = plugin.is_query_tool_available
    plugin.is_query_tool_available = lambda name: name != "sacct" and there(name)


def mend_submission(experiment: str) -> None:
    """Let the plugin submit with `Submissions`, and exclude no node but those that it was told to exclude.

    The comment of a job then has its `experiment` too.
    """
    import snakemake_executor_plugin_slurm as plugin

    submissions, executor = Submissions(experiment), plugin.Executor
    plugin.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": submissions.prepare})
    for name in ("cancel", "shutdown"):
        setattr(executor, name, _after_submissions(submissions, getattr(executor, name)))
    # a copy each time, so that nothing can be added
    executor._failed_nodes = property(
        lambda self: set(vars(self)["_failed_nodes"]), lambda self, nodes: vars(self).update(_failed_nodes=nodes)
    )


def refusal(said: str) -> str:
    """What sbatch says of a refused job, in one line."""
    lines = [re.sub(r"^sbatch: (error: )?", "", line.strip()) for line in said.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))


class Submissions:
    """The submissions of one workflow: asked for again while they are refused for a reason that passes."""

    def __init__(self, experiment: str) -> None:
        self.experiment = experiment
        self.ended = threading.Event()
        """Snakemake ends: a refusal counts."""
        self.refused_since: float | None = None
        """The first of the refusals that pass since sbatch last said anything else."""

    def prepare(self, call: str, **options: Any) -> _Submission:
        """In the place of `subprocess.Popen`, with its options."""
        named = re.sub(r"(?<= --comment )(\S+)", rf"\1{OF_EXPERIMENT}{shlex.quote(self.experiment)}", call, count=1)
        return _Submission(self, named, options)

    def patient(self, wait: float) -> bool:
        """Whether a refused submission may be tried again after `wait` seconds."""
        now = time.monotonic()
        self.refused_since = now if self.refused_since is None else self.refused_since
        return now + wait <= self.refused_since + PATIENCE


class _Submission:
    """What the plugin uses of a `Popen` of sbatch."""

    def __init__(self, submissions: Submissions, call: str, options: dict[str, Any]) -> None:
        self.submissions, self.call, self.options = submissions, call, options
        self.returncode = 0

    def communicate(self, input: str | None = None) -> tuple[str, str]:
        """sbatch's output and errors, once it accepts the job or refuses it for good; `returncode` is its own."""
        wait = FIRST_WAIT
        while True:
            with subprocess.Popen(self.call, **self.options) as process:
                out, err = process.communicate(input)
            self.returncode = process.returncode
            if not self.returncode or not PASSES.search(err):
                self.submissions.refused_since = None
                return out, err
            if not self.submissions.patient(wait):
                return out, err
            job = re.search(rf"--comment ([^\s{OF_EXPERIMENT}]+)", self.call)
            log.warning(
                "sbatch refuses %s for now: %s; trying again in %.0f s", job[1] if job else "a job", refusal(err), wait
            )
            if self.submissions.ended.wait(wait):
                return out, err
            wait = min(2 * wait, LONGEST_WAIT)


def _after_submissions(submissions: Submissions, method: Callable[[Any], None]) -> Callable[[Any], None]:
    """`method` of the executor, which first ends the submissions: nothing is submitted after the jobs are cancelled."""

    def ended(executor: Any) -> None:
        submissions.ended.set()
        executor._job_submission_executor.shutdown(cancel_futures=True)
        method(executor)

    return ended
