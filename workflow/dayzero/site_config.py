"""What `snakemake` runs and where it puts the results, by config/config.yaml: for all that is not Snakemake."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dayzero.config_overrides import config_overrides
from dayzero.errors import ConfigError
from dayzero.experiment import Experiment, experiment_path, load_experiment

CONFIG = Path("config/config.yaml")


class SiteConfig(NamedTuple):
    """The site's settings, read."""

    experiment: str
    """The file of the experiment that runs."""
    results: str
    """The folder of all results."""
    overrides: dict[str, Any]
    """Dotted key -> value: what is set over the experiment."""


def site_config(config: Mapping[str, Any]) -> SiteConfig:
    """Read Snakemake's `config`. Raises ConfigError for a missing or unknown key."""
    overrides = config_overrides(config, site_keys=["experiment", "results_dir"])
    for key in ("experiment", "results_dir"):
        if config.get(key) in (None, ""):
            raise ConfigError(f"{CONFIG}: {key} is not set: write `{key}: ...`, or give it with --config {key}=...")
    file = str(experiment_path(str(config["experiment"])))
    return SiteConfig(file, str(config["results_dir"]).rstrip("/"), overrides)


def load(experiment: str | None = None, settings: Mapping[str, Any] | None = None) -> tuple[Experiment, str]:
    """The experiment as Snakemake would run it in this folder, and the folder of all results.

    `experiment`: its name or file, in place of the one that config/config.yaml names. `settings`: dotted key -> value,
    over what is set there. Raises ConfigError.
    """
    site = site_config({**_read(), **({"experiment": experiment} if experiment else {})})
    return load_experiment(site.experiment, {**site.overrides, **(settings or {})}), site.results


def _read() -> dict[str, Any]:
    """config/config.yaml, by Snakemake's own reader."""
    from snakemake.common.configfile import load_configfile
    from snakemake.exceptions import WorkflowError

    try:
        return dict(load_configfile(str(CONFIG)))
    except FileNotFoundError:
        raise ConfigError(f"{CONFIG}: no such file in {Path.cwd()}: go to the folder of the Snakefile") from None
    except (WorkflowError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{CONFIG}: {' '.join(str(error).split())}") from None
