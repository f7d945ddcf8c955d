"""The SLURM profile under the real Snakemake and its real executor; SLURM's commands and the stages are stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.terminal import heeding_signals
from tests.workflow.project import ROOT, STAND_IN, Project, make_project

COMMANDS = {
    # refuses as often as `times` has lines, then runs the job in the background and notes its end
    "sbatch": """#!/bin/sh
echo "$@" | head -c 300 >> {folder}/calls; echo >> {folder}/calls
id=$(wc -l < {folder}/calls)
if [ $id -le $(cat {folder}/times) ]; then
    echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2
    exit 1
fi
for last; do :; done
(sh -c "${{last#--wrap=}}" && echo "$id|COMPLETED" >> {folder}/states || echo "$id|FAILED" >> {folder}/states) \\
    > {folder}/$id.out 2>&1 &
echo $id
""",
    "srun": '#!/bin/sh\nwhile [ "$1" != "${{1#-}}" ]; do shift; done\nexec "$@"\n',
    "squeue": "#!/bin/sh\ncat {folder}/states 2>/dev/null; exit 0\n",
    "sinfo": "#!/bin/sh\necho 'cpu*|(null)|1-00:00:00|4'\n",
    "scontrol": "#!/bin/sh\necho 'MinJobAge               = 300 sec'\n",
    "scancel": "#!/bin/sh\n",
    "sacctmgr": "#!/bin/sh\nexit 1\n",
    "sshare": "#!/bin/sh\nexit 1\n",
    "sacct": "#!/bin/sh\nexit 1\n",
}


@pytest.fixture
def site(tmp_path: Path) -> Project:
    (tmp_path / "bin").mkdir()
    for name, script in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(script.format(folder=tmp_path))
        (tmp_path / "bin" / name).chmod(0o755)
    return make_project(tmp_path / "project")


def started(site: Project, refused: int, *arguments: str) -> subprocess.Popen[str]:
    """Snakemake with the SLURM profile, whose first submissions are refused."""
    folder = site.path.parent
    (folder / "times").write_text(str(refused))
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = dict(os.environ, PATH=path, PYTHONPATH=f"{STAND_IN}{os.pathsep}{ROOT / 'workflow'}", COLUMNS="200")
    command = ["-m", "snakemake", "--profile", "slurm", "--retries", "0", "--until", "check_data"]
    more = ["--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "5"]
    return subprocess.Popen(
        heeding_signals(*command, *more, *arguments), cwd=site.path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def calls(site: Project) -> int:
    file = site.path.parent / "calls"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_a_refused_submission_is_tried_again(site: Project) -> None:
    snakemake = started(site, 1)
    printed = snakemake.communicate(timeout=120)[0]
    assert snakemake.returncode == 0, printed
    (line,) = [line for line in printed.splitlines() if line.startswith("sbatch refuses rule_check_data")]
    assert line.endswith("for now: AssocMaxSubmitJobLimit; trying again in 5 s")
    assert calls(site) == 2


def test_snakemake_ends_while_a_submission_waits(site: Project) -> None:
    snakemake = started(site, 99)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not calls(site):
        time.sleep(0.1)
    time.sleep(1)
    snakemake.send_signal(signal.SIGINT)
    asked = time.monotonic()
    printed = snakemake.communicate(timeout=60)[0]
    assert time.monotonic() - asked < 30
    assert snakemake.returncode != 0
    assert calls(site) == 1
    assert "not submitted" in printed
    assert printed.count("AssocMaxSubmitJobLimit") >= 2  # where it was refused, and in the table


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--default-resources", "slurm_account=x", "--dry-run"], "slurm_account is set, but gpu_request is not"),
        (["--default-resources", "mem_mb=1000"], "executor: slurm is set, but gpu_request is not"),
        (["--set-resources", "train:slurm_partition=cpuu"], "set-resources train: slurm_partition = 'cpuu': no such"),
        (["--config", "set=resources.train.gpu=64"], "64 GPUs of a node, but the nodes of partition cpu have 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_submitted(site: Project, arguments: list[str], says: str) -> None:
    snakemake = started(site, 0, *arguments)
    printed = snakemake.communicate(timeout=60)[0]
    assert snakemake.returncode != 0
    assert says in printed
    assert "Traceback" not in printed
    assert "onstart" not in printed  # where Snakemake would have met it
    assert not calls(site)
