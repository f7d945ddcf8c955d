"""The `snakemake` command, which asks SLURM for its jobs' states every second, for short tests."""

import sys

from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor

Executor.next_seconds_between_status_checks = property(lambda _: 1, lambda *_: None)  # type: ignore[assignment]

if __name__ == "__main__":
    main(sys.argv[1:])
