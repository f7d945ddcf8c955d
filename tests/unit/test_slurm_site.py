"""Limits, partitions and types of GPUs of a site, by what its commands say; they are stand-ins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from dayzero.errors import ConfigError
from dayzero.slurm_accounts import account_problem, limit_problems
from dayzero.slurm_site import check_site, partitions
from dayzero.snakemake_resources import Site, job_resources
from snakemake_executor_plugin_slurm.utils import set_gres_string
from snakemake_executor_plugin_slurm.validation import validate_slurm_extra
from snakemake_interface_common.exceptions import WorkflowError

from tests.unit.slurm_requests import asked, wiring

SINFO = "cpu|(null)|1-00:00:00|4\ngpu*|gpu:a100:4(S:0-1),gpu:v100:2|1-00:00:00|2\n"
SACCTMGR = """#!/bin/sh
echo "$*" >> {folder}/asked
case "$*" in
*maxsubmitpu*) printf 'normal|50\\nlong|\\nShort|20\\n' ;;
*maxsubmitjobs*) while read -r l; do echo "$l"; done < {folder}/limits ;;
*cluster=mine*) echo ours ;;
*) printf 'ours\\ntheirs\\n' ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-ins; `limits` has the limit of each association, `asked` what sacctmgr was asked."""
    (tmp_path / "sinfo.txt").write_text(SINFO)
    (tmp_path / "limits").write_text("")
    for name, script in {
        "sinfo": f'#!/bin/sh\nwhile read -r l; do echo "$l"; done < {tmp_path}/sinfo.txt\n',
        "scontrol": "#!/bin/sh\nprintf 'BatchStartTimeout       = 10 sec\\nClusterName             = mine\\n'\n",
        "sacctmgr": SACCTMGR.format(folder=tmp_path),
        "sbatch": "#!/bin/sh\n",
        "sacct": "#!/bin/sh\n",
    }.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SNAKEMAKE_SLURM_PARTITIONS", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("limits", "refused", "warned"),
    [
        ("50\n", "jobs = 100: this cluster lets you have 50 jobs in the queue (MaxSubmitJobs): set jobs to 50", ""),
        ("50\n60\n", "this cluster lets you have 60 jobs", ""),
        ("\n50\n", "", "one of your accounts lets you have 50 jobs in the queue (MaxSubmitJobs)"),
        ("200\n50\n", "", "one of your accounts lets you have 50 jobs"),
        ("100\n", "", ""),
        ("\n", "", ""),
        ("", "", ""),
    ],
)
def test_a_limit_of_all_accounts_refuses_and_one_of_some_warns(
    cluster: Path, caplog: pytest.LogCaptureFixture, limits: str, refused: str, warned: str
) -> None:
    (cluster / "limits").write_text(limits)
    problems = limit_problems(100)
    assert len(problems) == bool(refused)
    assert refused in "".join(problems)
    assert bool(caplog.records) == bool(warned)
    assert warned in caplog.text


def test_limits_are_those_of_this_cluster_and_account(cluster: Path) -> None:
    limit_problems(100, "ours, other")
    (line,) = (cluster / "asked").read_text().splitlines()
    assert " cluster=mine account=ours,other format=maxsubmitjobs" in line
    assert account_problem("ours") is None
    assert "slurm_account = 'theirs'" in str(account_problem("theirs"))
    assert limit_problems(None) == []


def test_the_limit_of_a_quality_of_service(cluster: Path, caplog: pytest.LogCaptureFixture) -> None:
    (problem,) = limit_problems(100, qos="normal")
    assert problem.startswith("jobs = 100: qos normal lets you have 50 jobs in the queue (MaxSubmitJobsPerUser)")
    assert limit_problems(50, qos="normal") == limit_problems(100, qos="long", rules_qos=["long"]) == []
    assert not caplog.records
    assert limit_problems(50, qos="normal", rules_qos=["short"]) == []  # of one rule's jobs, of which there may be less
    assert "qos short lets you have 20 jobs" in caplog.text


def test_the_profile_s_quality_of_service_is_looked_at(cluster: Path) -> None:
    for given in ({"qos": "short"}, {"executor_settings": SimpleNamespace(qos="short")}):
        arguments = {"executor_settings": SimpleNamespace(), **given}
        with pytest.raises(ConfigError, match="qos short lets you have 20 jobs"):
            check_site(wiring(), Site(gpu_request="gres"), "", jobs=30, **arguments)


def checked(site: Site, overwritten: dict[str, dict[str, object]] | None = None, **train: object) -> None:
    run = wiring(parallelism={"dp_shard": train.get("gpu", 1)}, resources={"train": train})
    check_site(run, site, "", SimpleNamespace(), overwritten)


def test_a_node_of_the_default_partition_has_fewer_gpus(cluster: Path) -> None:
    site = Site(gpu_request="gres")
    checked(site, gpu=6)
    with pytest.raises(ConfigError, match="asks for 64 GPUs of a node, but the nodes of partition gpu have 6; spread"):
        checked(site, gpu=64)
    (cluster / "sinfo.txt").write_text(SINFO.replace("gpu*", "gpu"))
    checked(site, gpu=64)  # nobody knows where


def test_a_partition_that_the_executor_chooses_is_not_the_default(
    cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = wiring(parallelism={"dp_shard": 64}, resources={"train": {"gpu": 64}})
    check_site(run, Site(gpu_request="gres"), "", SimpleNamespace(partition_config="partitions.yaml"))
    monkeypatch.setenv("SNAKEMAKE_SLURM_PARTITIONS", "partitions.yaml")
    checked(Site(gpu_request="gres"), gpu=64)


def test_only_gpus_of_the_type_count(cluster: Path) -> None:
    assert {kind: partitions(kind)["gpu"].gpus for kind in ("", "a100", "v100", "h100")} == {
        "": 6, "a100": 4, "v100": 2, "h100": 0
    }  # fmt: skip
    site = Site(gpu_request="gres", gpu_type="a100")
    checked(site, gpu=4)
    with pytest.raises(ConfigError, match="asks for 6 GPUs of a node, but the nodes of partition gpu have 4 of type a"):
        checked(site, gpu=6)
    with pytest.raises(ConfigError, match=r"0 of type h100; gpu_type \(.*\) can be a100, v100$"):
        checked(Site(gpu_request="gres", gpu_type="h100"), gpu=1)
    (cluster / "sinfo.txt").write_text("gpu*|gpu:4|1-00:00:00|2\n")
    with pytest.raises(ConfigError, match=r"0 of type h100; gpu_type \(.*\) can be \"''\" \(any\)$"):
        checked(Site(gpu_request="gres", gpu_type="h100"), gpu=1)


def test_a_single_rule_s_partition_that_is_not_there(cluster: Path) -> None:
    site = Site(gpu_request="gres")
    with pytest.raises(ConfigError, match=r"set-resources train: slurm_partition = 'gpuu': no such .* mean gpu\?"):
        checked(site, overwritten={"train": {"slurm_partition": "gpu,gpuu"}})
    checked(site, overwritten={"train": {"slurm_partition": "gpu,cpu"}})
    checked(site, overwritten={"train": {"slurm_partition": "'cpu' if attempt > 1 else 'gpu'"}})


LONG_TYPE = "nvidia_a100-sxm4-80gb"


def executors_refusal(site: Site) -> str:
    """What the plugin says of a training of that site."""
    resources = asked("train", site, resources={"train": {"gpu": 1}})
    job = SimpleNamespace(resources=type("R", (dict,), {"__getattr__": dict.get})(resources))
    try:
        set_gres_string(job)
        validate_slurm_extra(job)
    except WorkflowError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("gpu_request", "small_runs", "remedy"),
    [
        ("gres", "", r"set gpu_request: \"'gpus-per-node'\"$"),
        ("gpus", "", r"set gpu_request: \"'gpus-per-node'\"$"),
        ("gpus-per-node", "true", r"set gpu_request: \"'gpus-per-node'\" and small_runs: false$"),
        ("gpus-per-node", "", None),
    ],
)
def test_a_type_of_gpu_that_the_executor_refuses(
    cluster: Path, gpu_request: str, small_runs: str, remedy: str | None
) -> None:
    site = Site(gpu_request=gpu_request, gpu_type=LONG_TYPE, small_runs=small_runs, cpu_partition="cpu")
    assert bool(executors_refusal(site)) == bool(remedy)
    if remedy:
        with pytest.raises(ConfigError, match=rf"^gpu_type = '{LONG_TYPE}' .*{remedy}"):
            checked(site)
    else:
        checked(site)
    checked(replace(site, gpu_type="a100"))


@pytest.mark.parametrize(("threads", "processes", "each"), [(52, 8, 6), (3, 8, 1), (52, 1, 26), (48, 8, 6)])
def test_a_job_asks_for_no_more_cpus_than_configured(threads: int, processes: int, each: int) -> None:
    found = asked("train", Site(gpu_request="gres"), threads=threads, parallelism={"dp_shard": processes})
    assert found["cpus_per_task"] == each


def test_a_site_without_its_way_to_ask_for_gpus() -> None:
    """As where --default-resources on the command line replaces the profile's."""
    with pytest.raises(ConfigError, match=r"slurm_account is set, but gpu_request is not .*replaces the whole"):
        Site.of({"mem_mb": 1000, "slurm_account": "x"})
    with pytest.raises(ConfigError, match="executor: slurm is set, but gpu_request is not"):
        check_site(wiring(), Site.of({"mem_mb": 1000}), "", SimpleNamespace())
    assert not Site.of({"mem_mb": 1000, "tmpdir": "/tmp"}).is_slurm
    assert "nodes" not in job_resources(wiring(), Site.of({}), "train")
