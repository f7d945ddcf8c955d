"""What a cluster's accounting lets this user do: the accounts that can be charged, and how many jobs may be queued."""

from __future__ import annotations

import getpass
import re
from collections.abc import Sequence

from dayzero.console import log
from dayzero.slurm import SlurmError, ask

PROFILE = "default-resources of profiles/slurm/config.yaml"


def account_problem(account: str) -> str | None:
    """Why this account cannot be charged; None where it can, or nobody says so."""
    listed = _associations("account")
    if listed is None:
        if answer("sacct", "--noheader", "-X") is not None:
            return None  # there are accounts, which this user may not list
        return (
            f"slurm_account = {account!r} ({PROFILE}): this cluster keeps no accounts (sacctmgr does not answer): "
            "leave slurm_account out"
        )
    accounts = sorted({name.strip().lower() for name in listed if name.strip()})
    wrong = [name for name in account_names(account) if accounts and name.lower() not in accounts]
    if wrong:
        return f"slurm_account = {wrong[0]!r} ({PROFILE}): not one of yours, which are {', '.join(accounts)}"
    return None


def account_names(account: str) -> list[str]:
    """The accounts that `slurm_account` names."""
    return account.replace(",", " ").split()


def limit_problems(jobs: int | None, account: str = "", qos: str = "", rules_qos: Sequence[str] = ()) -> list[str]:
    """Why so many jobs cannot be in the queue: sbatch refuses those above the site's limit.

    A limit that holds for some of the jobs alone, or perhaps for none, is warned about.

    Args:
        jobs: how many Snakemake keeps there at most. None: nothing is said.
        account: the account that pays. Empty: one of this user's.
        qos: the quality of service of all jobs. Empty: the site's default, whose limit is not looked at.
        rules_qos: those of single rules.
    """
    if jobs is None:
        return []
    problems = []
    limits = [_number(line) for line in _associations("maxsubmitjobs", account) or []]
    known = [limit for limit in limits if limit is not None]
    if known and len(known) == len(limits) and jobs > max(known):
        problems.append(_too_many(jobs, "this cluster", max(known), "MaxSubmitJobs"))
    elif known and jobs > min(known):
        log.warning("%s; those above it wait to be submitted", _too_many(jobs, "one of your accounts", min(known)))
    of_qos = _limits_of_qos() if qos or rules_qos else {}
    for name in dict.fromkeys((qos, *rules_qos)):
        limit = of_qos.get(name.lower())
        if limit is None or jobs <= limit:
            continue
        if name == qos:
            problems.append(_too_many(jobs, f"qos {name}", limit, "MaxSubmitJobsPerUser"))
        else:
            log.warning("%s; those above it wait to be submitted", _too_many(jobs, f"qos {name}", limit))
    return problems


def _too_many(jobs: int, where: str, limit: int, name: str = "MaxSubmitJobs") -> str:
    return (
        f"jobs = {jobs}: {where} lets you have {limit} jobs in the queue ({name}): set jobs to {limit} or less, less "
        "what else you have there"
    )


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def _associations(field: str, account: str = "") -> list[str] | None:
    """A field of this user's associations on this cluster (and account), a line each; None where sacctmgr does not
    answer."""
    query = ["list", "assoc", f"user={getpass.getuser()}"]
    if cluster := re.search(r"^ClusterName\s*=\s*(\S+)", answer("scontrol", "show", "config") or "", re.MULTILINE):
        query.append(f"cluster={cluster[1]}")
    if account:
        query.append(f"account={','.join(account_names(account))}")
    text = answer("sacctmgr", "--noheader", "--parsable2", *query, f"format={field}")
    return None if text is None else text.splitlines()


def _limits_of_qos() -> dict[str, int]:
    """By name, how many jobs each quality of service lets a user have in the queue, where it has a limit."""
    text = answer("sacctmgr", "--noheader", "--parsable2", "show", "qos", "format=name,maxsubmitpu") or ""
    rows = [line.partition("|")[::2] for line in text.splitlines()]
    return {name.lower(): int(limit) for name, limit in rows if limit.strip().isdigit()}


def answer(*command: str) -> str | None:
    """What a command of SLURM prints; None where it does not answer."""
    try:
        return ask(*command)
    except SlurmError:
        return None
