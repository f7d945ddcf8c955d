"""What all stages share: arguments, offline mode, one readable line for an error, and its exit code."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dayzero.console import SECONDS_BETWEEN_LINES, console, log, setup_logging
from dayzero.errors import ConfigError, Told, one_line
from dayzero.files import read_json

EXIT_ERROR = 1


def stage_parser(stage: str, description: str | None, *, config: bool = True) -> argparse.ArgumentParser:
    """A parser with what every stage takes: `--log` and, where it acts on one run's `config`, `--config`."""
    parser = argparse.ArgumentParser(prog=f"dayzero.stages.{stage}", description=description)
    if config:
        parser.add_argument("--config", required=True, help="a run's config.json (or its relevant part as JSON text)")
    parser.add_argument("--log", help="also write the log to this file")
    return parser


def read_config(text_or_path: str) -> dict[str, Any]:
    """The config as a dict, from a file or from JSON text; raises ConfigError where it is none."""
    import json

    try:
        config = json.loads(text_or_path) if text_or_path.lstrip().startswith("{") else read_json(text_or_path)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--config: not valid JSON ({error}): give a run's config.json") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--config {text_or_path}: not a JSON object: give a run's config.json")
    return config


def trusts_code(config: Mapping[str, Any]) -> bool:
    """Whether the code of the run's model may be run: `model.trust_remote_code`, which is left out where it is off."""
    from dayzero.config import Model

    return Model.model_validate(config.get("model") or {}).trust_remote_code


def run_stage(
    parser: argparse.ArgumentParser,
    body: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None = None,
    *,
    network: bool = False,
) -> int:
    """Parse `argv`, run `body`, and turn any error into one last readable line and a non-zero exit code.

    Only stages with `network` may reach a hub: the others run with the Hugging Face libraries offline, which must be
    set before those are imported, so a stage imports them inside `body`.
    """
    args = parser.parse_args(argv)
    stage = parser.prog.rpartition(".")[2]
    if not network:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ[name] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not console.is_terminal:  # the libraries' progress bars; read when tqdm is imported
        os.environ.setdefault("TQDM_MININTERVAL", str(SECONDS_BETWEEN_LINES))
    try:
        setup_logging(stage, args.log)
        body(args)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else EXIT_ERROR
    except KeyboardInterrupt:
        log.error("interrupted")
        return 130
    except Exception as error:
        _report(error, args.log)
        return EXIT_ERROR
    return 0


def _report(error: Exception, log_file: str | None) -> None:
    """The traceback goes to the log file (or, for unforeseen errors without one, to stderr); one line comes last.

    There is none where a rank has shown its own, nor of a user's mistake, of which the line is all there is to know.
    """
    if not isinstance(error, Told | ConfigError):
        if log_file:
            # the log may lie on the very disk that is full or read-only
            with contextlib.suppress(OSError), open(log_file, "a", encoding="utf-8") as f:
                traceback.print_exception(error, file=f)
        elif not isinstance(error, ValueError | OSError):
            traceback.print_exception(error, file=sys.stderr)
    log.error("error: %s", one_line(error))
