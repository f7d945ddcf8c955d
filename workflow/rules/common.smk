"""The experiment that is run, resolved before any rule is read."""

import os
import sys

from snakemake.exceptions import WorkflowError
from snakemake.resources import Resource

from dayzero.config_overrides import override_arguments
from dayzero.wiring import Wiring
from dayzero.errors import ConfigError
from dayzero.experiment import load_experiment
from dayzero.failures import print_failures
from dayzero.files import check_folder, check_writable
from dayzero.site_config import site_config
from dayzero.slurm_arrays import become_task
from dayzero.slurm_groups import become_group
from dayzero.slurm_site import check_site
from dayzero.snakemake_resources import (
    Site,
    by_run,
    job_resources,
    job_threads,
    launch_arguments,
    named,
)
from dayzero.store import RUN_NAME

try:
    become_task(sys.argv)
    become_group(sys.argv)
except ConfigError as error:
    raise WorkflowError(str(error)) from None

# jobs run the `python` that runs Snakemake; a conda environment, where one is activated, still comes first
os.environ.update(
    PATH=os.pathsep.join(
        [os.path.dirname(sys.executable), os.getenv("PATH", os.defpath)]
    )
)

# jobs that go to other machines ask for what the run's config says, not for at most the cores of this one
if workflow.resource_settings.nodes is not None:
    workflow.resource_settings.cores = sys.maxsize
    workflow.global_resources["_cores"] = Resource("_cores", sys.maxsize)

try:
    EXPERIMENT_FILE, RESULTS, OVERRIDES = site_config(config)
    EXPERIMENT = load_experiment(EXPERIMENT_FILE, OVERRIDES)
    WIRING = Wiring(EXPERIMENT, RESULTS)
    SITE = Site.of(workflow.resource_settings._parsed_default_resources)
    ACCOUNT, QOS = (
        named(workflow.resource_settings._parsed_default_resources, name)
        for name in ("slurm_account", "qos")
    )
    WIRING.check_local_files()
    check_folder(RESULTS)
except ConfigError as error:
    raise WorkflowError(str(error)) from None

RUN = f"{RESULTS}/{EXPERIMENT.name}/{{run}}"
STORE = f"{RESULTS}/store"
REPORT = f"{RESULTS}/{EXPERIMENT.name}/report"
PLOTS = [
    "loss",
    "scores",
    "throughput",
    "memory",
    "stage_time",
    "document_lengths",
    "label_share",
    "languages",
]


onstart:
    try:
        check_writable(RESULTS)
        if SITE.is_slurm or workflow.executor_plugin.name == "slurm":
            limit = workflow.scheduling_settings.max_jobs_per_timespan
            check_site(
                WIRING,
                SITE,
                ACCOUNT,
                workflow.executor_settings,
                overwritten=workflow.resource_settings.overwrite_resources,
                at_once=min(
                    workflow.resource_settings.nodes or 1,
                    limit.max_jobs if limit else sys.maxsize,
                ),
                jobs=workflow.resource_settings.nodes,
                qos=QOS,
                groups=workflow.group_settings.overwrite_groups,
                components=workflow.group_settings.group_components,
            )
    except ConfigError as error:
        # an exception would be shown between lines that name this file, as if the fault were here
        sys.exit(str(error))


onerror:
    print_failures(log)


wildcard_constraints:
    run=RUN_NAME,
    key=RUN_NAME,
