"""Runs the `snakemake` command without paying for its imports each time: a fresh fork for every line of stdin.

A line is JSON: {"cwd", "arguments", "output"}; the answer is the exit code. What the command prints goes to `output`.
"""

import json
import os
import sys

import dayzero.wiring  # noqa: F401 (the Snakefile imports it)
import smart_open  # noqa: F401 (Snakemake imports it when it reads the Snakefile)
import snakemake.cli


def run(cwd: str, arguments: list[str], output: str) -> int:
    """Fork, become the command, wait for its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(cwd)
        sys.argv = ["snakemake", *arguments]
        snakemake.cli.main(arguments)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


for line in sys.stdin:
    print(run(**json.loads(line)), flush=True)
