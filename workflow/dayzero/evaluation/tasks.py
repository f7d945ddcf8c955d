"""Which lm-eval tasks a run asks for: found, filled in with the run's data, and loaded."""

from __future__ import annotations

import difflib
import json
import re
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from dayzero.console import log
from dayzero.errors import ConfigError, DataError, short


def load_tasks(names: Sequence[str], tasks_dir: Path, data: Path, work_dir: Path) -> dict[str, Any]:
    """lm-eval's `{"tasks": {name: task}, "groups": {name: group}}` for the named tasks.

    Local tasks (YAML files under `tasks_dir`) may name `{data}`, the folder of the run's splits, and `{cache}`; they
    are copied to `work_dir`, which must live as long as the tasks, and filled in there. Raises ConfigError for a name
    that is neither local nor built into lm-eval, for data that is not there and for columns that the data lacks.
    """
    local = work_dir / "tasks"
    _fill(tasks_dir, local, {"data": str(data.resolve()), "cache": str((work_dir / "cache").resolve())})
    local_manager = TaskManager(include_path=str(local), include_defaults=False)
    local_names = list(local_manager.all_tasks)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    for name in names:
        manager = local_manager if name in local_names else _built_in()
        if name not in manager.all_tasks:
            raise _unknown(name, [*local_names, *manager.all_tasks], local_names, tasks_dir)
        if name in local_names:
            _check_files(name, manager.task_index[name].cfg or {}, data)
        try:
            part = manager.load([name])
        except Exception as error:
            raise _unloadable(name, error, name in local_names, manager.task_index[name].cfg or {}) from error
        for kind in loaded:
            loaded[kind].update(part[kind])
        if name in local_names:
            for task in part["tasks"].values():
                _check_columns(name, task, data)
    return loaded


@cache
def _built_in() -> TaskManager:
    log.info("reading the index of lm-eval's built-in tasks")
    return TaskManager()


def task_questions(task: Any) -> list[str]:
    """What each item of a task asks: its `doc_to_decontamination_query`, else its prompt, else its target."""
    asked = []
    for doc in task.eval_docs:
        query = task.doc_to_decontamination_query(doc) if task.should_decontaminate() else task.doc_to_text(doc)
        text = query if isinstance(query, str) else ""
        asked.append(text if text.strip() else str(task.doc_to_target(doc)))
    return asked


def _fill(source: Path, target: Path, values: dict[str, str]) -> None:
    if not source.is_dir():
        raise ConfigError(f"--tasks-dir {source} is no folder: name the folder with the task YAML files")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    for path in target.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        for key, value in values.items():
            # not {{data}}, which is Jinja; escaped as the placeholders stand in double quotes
            escaped = json.dumps(value)[1:-1].replace("\\", r"\\")
            text = re.sub(rf"(?<!\{{)\{{{key}\}}(?!\}})", escaped, text)
        path.write_text(text, encoding="utf-8")


def _unknown(name: str, known: Sequence[str], local: Sequence[str], tasks_dir: Path) -> ConfigError:
    close = difflib.get_close_matches(name, known, n=3)
    hint = (
        f"did you mean {' or '.join(close)}?" if close else f"the local tasks are: {', '.join(sorted(local)) or 'none'}"
    )
    return ConfigError(f"evaluate.tasks: {name!r} is neither in {tasks_dir} nor built into lm-eval; {hint}")


def _check_files(name: str, config: dict[str, Any], data: Path) -> None:
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    values = files.values() if isinstance(files, dict) else [files]
    for file in (f for value in values for f in (value if isinstance(value, list) else [value])):
        if (
            isinstance(file, str)
            and Path(file).is_absolute()
            and not re.search(r"[*?\[]", file)
            and not Path(file).exists()
        ):
            raise ConfigError(
                f"evaluate.tasks: {name!r} reads {Path(file).name}, which {data} does not have: "
                f"set data.test_size or data.test_source, or leave the task out"
            )


def _check_columns(name: str, task: Any, data: Path) -> None:
    """lm-eval takes a column name that does not exist as a literal prompt; that must not be scored."""
    for key in ("doc_to_text", "doc_to_target"):
        value = task.get_config(key)
        if isinstance(value, str) and value.isidentifier() and value not in task.features:
            raise DataError(
                f"evaluate.tasks: {name!r} needs the column {value!r}, which the data in {data} lacks "
                f"(it has {', '.join(task.features)}): choose a task that fits data.format"
            )


def _unloadable(name: str, error: Exception, is_local: bool, config: dict[str, Any]) -> Exception:
    """One line for a task that does not load; missing data of a built-in task is the usual reason."""
    text = short(error, 300)
    if is_local:
        return ConfigError(
            f"evaluate.tasks: {name!r} does not load: {type(error).__name__}: {text}: mend its "
            "file in config/tasks, or leave the task out"
        )
    if isinstance(error, ConnectionError | FileNotFoundError) or "ffline" in text or "hub" in text.lower():
        source = ", ".join(repr(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key))
        return ConfigError(
            f"evaluate.tasks: {name!r} is built into lm-eval, but its data is not on this machine and this stage works "
            f"offline: where there is a network, run datasets.load_dataset({source}) once, or leave the task out"
        )
    return ConfigError(
        f"evaluate.tasks: lm-eval's {name!r} does not load: {type(error).__name__}: {text}: install what it "
        "needs, or leave the task out"
    )
