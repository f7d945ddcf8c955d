"""One YAML file -> its runs: recipe, experiment, run and command line merged, all mistakes found before any job runs.

Nothing here imports torch or Snakemake, so that parsing stays fast. Command line: `python -m dayzero.experiment -h`.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dayzero import config_overrides
from dayzero.config import RunConfig
from dayzero.config_checks import Finding, impossible, without_effect
from dayzero.config_errors import ConfigProblems, Problem, did_you_mean, unknown_key, wrong_value
from dayzero.config_keys import EXPERIMENT_KEYS, KEYS, default_of, experiment_schema, run_schema
from dayzero.config_layers import (
    COMMAND_LINE,
    COMMAND_LINE_RUN,
    DEFAULTS,
    RECIPE,
    RUN,
    Leaf,
    Tree,
    locate,
    merge,
    read_layer,
    values,
    walk,
)
from dayzero.errors import ConfigError
from dayzero.files import write_json
from dayzero.store import RUN_NAME
from dayzero.strict_yaml import Entry, plain, read_yaml

RECIPES = Path("config/recipes")
RESERVED_RUNS = {"report": "the report's folder has that name", "logs": "the logs' folder has that name"}
RESERVED_EXPERIMENTS = {"store": "the folder shared by all experiments has that name"}

OWN_LEVELS = (RUN, COMMAND_LINE_RUN)


@dataclass(frozen=True)
class Experiment:
    """A resolved experiment: its runs in the file's order."""

    name: str
    description: str
    runs: dict[str, RunConfig]


def load_experiment(
    path: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    recipes: str | Path = RECIPES,
    only: Collection[str] | None = None,
) -> Experiment:
    """Resolve the runs of an experiment file.

    `overrides` maps dotted keys (`train.max_steps`, `runs.lora.train.max_steps` for one run) to values and wins over
    the file. `only` resolves just these runs. Raises ConfigError: `ConfigProblems` with all mistakes found.
    """
    path = Path(path)
    root = read_yaml(path)
    loader = _Loader(path, root, Path(recipes))
    runs = loader.resolve(overrides or {}, only)
    if loader.problems:
        raise ConfigProblems(loader.problems)
    return Experiment(path.stem, loader.description, runs)


def experiment_path(name: str, folder: str | Path = "config/experiments") -> Path:
    """The file of an experiment given by its name or its path."""
    return Path(name) if name.endswith((".yaml", ".yml")) or "/" in name else Path(folder) / f"{name}.yaml"


class _Loader:
    """Collects the problems of one experiment while its layers are read and merged."""

    def __init__(self, path: Path, root: Entry, recipes: Path) -> None:
        self.path, self.recipes_folder = path, recipes
        self.problems: list[Problem] = []
        self._recipes: dict[str, Tree] = {}
        self._top = self._mapping(root, "the file")
        for key in (key for key in self._top if key not in EXPERIMENT_KEYS):
            hint = f"put it under defaults: (as {key})" if key in KEYS else ""
            self.problems.append(unknown_key(self._top[key].where, key, EXPERIMENT_KEYS, hint=hint))
        description = self._top.get("description", Entry("", ""))
        if not isinstance(description.value, str):
            self.problems.append(Problem(description.where, "description", "expected text", plain(description.value)))
        self.description = str(description.value)
        self._check_name()

    def resolve(self, overrides: Mapping[str, Any], only: Collection[str] | None) -> dict[str, RunConfig]:
        entries = self._run_entries()
        shared, of_run = self._command_line(overrides, entries)
        recipe = self._recipe(self._top.get("recipe"))
        defaults = read_layer(self._mapping(self._top.get("defaults"), "defaults"), DEFAULTS, self.problems)
        runs, settled = {}, []
        for name, entry in entries.items():
            if only is not None and name not in only:
                continue
            own = self._mapping(entry, f"runs.{name}")
            layers = [
                recipe,
                self._recipe(own.pop("recipe", None)),
                defaults,
                read_layer(own, RUN, self.problems),
                shared,
                of_run.get(name, {}),
            ]
            merged: Tree = {}
            for layer in layers:
                merge(merged, layer)
            run = self._validate(name, merged)
            if run:
                runs[name] = run
                settled.append((run, merged))
        if only is not None and (missing := set(only) - entries.keys()):
            self.problems += [self._no_such_run(str(self.path), name, entries) for name in sorted(missing)]
        if only is None and len(runs) == len(entries):
            self._ignored_by_all(settled)
        return runs

    def _check_name(self) -> None:
        name = self.path.stem
        if not re.fullmatch(RUN_NAME, name):
            self.problems.append(Problem(str(self.path), "file name", f"{name!r} must match {RUN_NAME}"))
        if reason := RESERVED_EXPERIMENTS.get(name.lower()):
            self.problems.append(Problem(str(self.path), "file name", f"{name!r} cannot be used: {reason}"))

    def _run_entries(self) -> dict[str, Entry]:
        entries = self._mapping(self._top.get("runs"), "runs")
        if not entries:
            self.problems.append(Problem(str(self.path), "runs", "name at least one run"))
        seen: dict[str, str] = {}
        for name, entry in entries.items():
            key = f"runs.{name}"
            if not re.fullmatch(RUN_NAME, name):
                self.problems.append(
                    Problem(
                        entry.where,
                        key,
                        "a run's name has letters, digits, '_', '-' and '.', and starts with a letter or digit",
                    )
                )
            if reason := RESERVED_RUNS.get(name.lower()):
                self.problems.append(Problem(entry.where, key, f"this name cannot be used: {reason}"))
            if name.lower() in seen:
                self.problems.append(
                    Problem(entry.where, key, f"differs from runs.{seen[name.lower()]} only in case: rename one")
                )
            seen[name.lower()] = name
        return entries

    def _recipe(self, entry: Entry | None) -> Tree:
        """The named recipes, merged in order."""
        merged: Tree = {}
        if entry is None or entry.value is None:
            return merged
        names = entry.value if isinstance(entry.value, list) else [entry.value]
        for name in names:
            if not isinstance(name, str):
                self.problems.append(
                    Problem(entry.where, "recipe", "expected a recipe's name or a list of names", name)
                )
                continue
            if name not in self._recipes:
                self._recipes[name] = self._read_recipe(name, entry.where)
            merge(merged, self._recipes[name])
        return merged

    def _read_recipe(self, name: str, where: str) -> Tree:
        path = self.recipes_folder / f"{name}.yaml"
        if not path.is_file():
            known = sorted(
                p.relative_to(self.recipes_folder).with_suffix("").as_posix()
                for p in self.recipes_folder.rglob("*.yaml")
            )
            self.problems.append(Problem(where, "recipe", f"no {path}; {did_you_mean(name, known)}", name))
            return {}
        entries = self._mapping(read_yaml(path), "the file")
        entries.pop("description", None)
        return read_layer(entries, RECIPE, self.problems)

    def _command_line(self, overrides: Mapping[str, Any], runs: Collection[str]) -> tuple[Tree, dict[str, Tree]]:
        shared: dict[str, Entry] = {}
        of_run: dict[str, dict[str, Entry]] = {}
        for key, value in overrides.items():
            if key != "runs" and not key.startswith("runs."):
                shared[key] = config_overrides.entry_of(value)
                continue
            # a run's name may hold dots: the longest name that fits
            rest = key.removeprefix("runs.")
            name = max((run for run in runs if rest.startswith(f"{run}.")), key=len, default=None)
            if name is None:
                self.problems.append(self._no_such_run(config_overrides.PLACE, rest.partition(".")[0], runs))
            else:
                of_run.setdefault(name, {})[rest.removeprefix(f"{name}.")] = config_overrides.entry_of(value)
        return (
            read_layer(shared, COMMAND_LINE, self.problems),
            {name: read_layer(entries, COMMAND_LINE_RUN, self.problems) for name, entries in of_run.items()},
        )

    def _no_such_run(self, where: str, name: str, runs: Collection[str]) -> Problem:
        return Problem(where, f"runs.{name}", f"no such run; {did_you_mean(name, runs, 'the runs are')}")

    def _mapping(self, entry: Entry | None, name: str) -> dict[str, Entry]:
        if entry is None or entry.value is None:
            return {}
        if not isinstance(entry.value, dict):
            self.problems.append(Problem(entry.where, name, "expected a mapping of keys", plain(entry.value)))
            return {}
        return dict(entry.value)

    def _validate(self, name: str, merged: Tree) -> RunConfig | None:
        problems = [
            Problem(leaf.where, key, "not a finite number", leaf.value)
            for key, leaf in walk(merged)
            if isinstance(leaf.value, float) and not math.isfinite(leaf.value)
        ]
        try:
            run = RunConfig.model_validate({"experiment": self.path.stem, "run": name, **values(merged)})
        except ValidationError as error:
            for found in error.errors(include_url=False):
                key, leaf = locate(merged, [str(part) for part in found["loc"]])
                if key and not any(p.key == key for p in problems):
                    problems.append(wrong_value(leaf.where, key, leaf.value, found["msg"]))
            self.problems += problems
            return None
        findings = [self._finding(name, merged, finding) for finding in impossible(run)]
        ignored = [
            Problem(leaf.where, key, finding.message, leaf.value)
            for finding, key, leaf in _ignored(run, merged)
            if leaf.level in OWN_LEVELS
        ]
        self.problems += problems + findings + ignored
        return run

    def _finding(self, run: str, merged: Tree, finding: Finding) -> Problem:
        key, leaf = locate(merged, finding.key.split("."))
        if key == finding.key:
            return Problem(leaf.where, key, finding.message, leaf.value, run)
        return Problem(str(self.path), finding.key, finding.message, run=run)

    def _ignored_by_all(self, runs: list[tuple[RunConfig, Tree]]) -> None:
        """Shared settings may be without effect in some runs, but not in every run."""
        ignored: dict[tuple[str, str], Problem] = {}
        used: set[tuple[str, str]] = set()
        for run, merged in runs:
            unused = {(key, leaf.where): (finding, leaf) for finding, key, leaf in _ignored(run, merged)}
            used |= {(key, leaf.where) for key, leaf in walk(merged)} - unused.keys()
            for (key, where), (finding, leaf) in unused.items():
                # config.yaml's resources are the machine's, for whatever experiment runs there
                if leaf.level == DEFAULTS or (leaf.level == COMMAND_LINE and not key.startswith("resources.")):
                    ignored[key, where] = Problem(where, key, f"no run uses it: {finding.message}", leaf.value)
        self.problems += [problem for place, problem in ignored.items() if place not in used]


def _ignored(run: RunConfig, merged: Tree) -> Iterator[tuple[Finding, str, Leaf]]:
    """The set keys that do nothing in `run`; null, and a default that means off, ask for nothing and are none."""
    for finding in without_effect(run):
        node: Any = merged
        for part in finding.key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        found = walk(node, f"{finding.key}.") if isinstance(node, dict) else [(finding.key, node)] if node else []
        yield from ((finding, key, leaf) for key, leaf in found if not _asks_for_nothing(key, leaf.value))


def _asks_for_nothing(key: str, value: Any) -> bool:
    return value is None or (not value and value == default_of(key))


def main(argv: list[str] | None = None) -> int:
    """Check an experiment as `snakemake` would run it here, or write the JSON schemas."""
    from dayzero import site_config  # it loads experiments itself

    parser = argparse.ArgumentParser(prog="dayzero.experiment", description=main.__doc__)
    parser.add_argument("experiment", nargs="?", help="a name in config/experiments or a file: check it, list its runs")
    parser.add_argument("--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="over config.yaml")
    parser.add_argument("--print-folder", action="store_true", help="print the folder of its results, not its runs")
    parser.add_argument("--write-schemas", metavar="FOLDER", help="write the JSON schemas (workflow/schemas)")
    args = parser.parse_args(argv)
    if args.write_schemas:
        for name, schema in (("experiment", experiment_schema()), ("run", run_schema())):
            write_json(Path(args.write_schemas) / f"{name}.schema.json", schema)
    if args.experiment or not args.write_schemas:
        try:
            experiment, results = site_config.load(args.experiment, config_overrides.parse_assignments(args.set))
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{results}/{experiment.name}" if args.print_folder else "\n".join(experiment.runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
