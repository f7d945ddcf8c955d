"""How snakemake-executor-plugin-slurm (2.8) asks sacct for job states, mended.

It knows no state but bare words, and sacct says "CANCELLED by 1000": a cancelled job would be waited for for ever. And
it asks for raw ids, in which the last task of an array has the array's own id and the others ids that nobody was told:
each would be judged by the last one's end.
"""

from __future__ import annotations

import shlex
from datetime import datetime, timedelta

DAYS = 2
"""How far back jobs are looked for, as the plugin does."""


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
