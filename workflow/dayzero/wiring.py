"""Which files each stage of an experiment reads: what the Snakemake rules ask, so that they hold no logic."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from dayzero import store
from dayzero.config import RunConfig, StageResources, TrainResources
from dayzero.config_errors import ConfigProblems, Problem, did_you_mean
from dayzero.errors import ConfigError
from dayzero.experiment import Experiment
from dayzero.files import canonical_json
from dayzero.source import is_missing, listed, local_files


class Wiring:
    """The files of one experiment under `results`; paths are text, as Snakemake wants them.

    A stored directory is named by its `manifest.json`, which is written last. What a job of the store may know comes
    from its key alone, so that every run and experiment with that key wants the very same job.
    """

    def __init__(self, experiment: Experiment, results: str, tasks: str = "config/tasks") -> None:
        self.name, self.runs, self.tasks = experiment.name, experiment.runs, Path(tasks)
        self.store, self.experiment = f"{results}/store", f"{results}/{experiment.name}"
        self._of_key: dict[str, RunConfig] = {}
        self._keys: dict[tuple[str, int], str] = {}
        self._files_of_tasks: dict[tuple[str, ...], list[str]] = {}
        for run in self.runs.values():
            kinds = ["data", "tokens"]
            kinds += ["model"] if run.model.source else []
            kinds += ["tokenizer"] if run.model.tokenizer else []
            kinds += ["check"] if run.method.name != "none" else []
            for kind in kinds:
                self._of_key.setdefault(self._key(kind, run), run)
        for run in self.runs.values():
            if (teacher := store.with_teacher(run)) and run.method.kd.teacher not in self.runs:
                self._of_key.setdefault(store.model_key(teacher), teacher)

    def run(self, name: str) -> RunConfig:
        """The run of that name; ConfigError if the experiment has none."""
        if name not in self.runs:
            raise ConfigError(f"{self.experiment} has no run {name}; {did_you_mean(name, self.runs, 'its runs are')}")
        return self.runs[name]

    def of_key(self, key: str) -> RunConfig:
        """A run that uses this key of the store; ConfigError if none does."""
        if key not in self._of_key:
            raise ConfigError(f"no run of {self.experiment} uses {key}: name one with --config experiment=...")
        return self._of_key[key]

    def check_local_files(self) -> None:
        """Raise ConfigError naming every local source, chat template and teacher that is not there."""
        problems = [problem for run in self.runs.values() for problem in self._teacher_problems(run)]
        for run in self._of_key.values():
            for key, sources in _named_sources(run).items():
                if any(problem.value == sources for problem in problems):
                    continue  # a teacher that was said
                message = f"no such file or directory (looked from {Path.cwd()})"
                problems += [Problem(self.name, key, message, text) for text in listed(sources) if is_missing(text)]
            for template in self.chat_template(run):
                if not Path(template).is_file():
                    message = f"no such file (looked from {Path.cwd()})"
                    problems.append(Problem(self.name, "model.chat_template", message, template))
        if problems:
            raise ConfigProblems(problems)

    # what the store's jobs depend on
    def spec(self, kind: str, key: str) -> str:
        """The part of the config that `store/{kind}/{key}` is made from, as JSON text."""
        specs = {
            "data": store.data_spec,
            "models": store.model_spec,
            "tokenizers": store.tokenizer_spec,
            "tokens": store.tokens_spec,
            "checks": store.check_spec,
        }
        return canonical_json(specs[kind](self.of_key(key)))

    def local_data(self, key: str) -> list[str]:
        """The local files among the sources of `store/data/{key}`."""
        named = _named_sources(self.of_key(key))
        texts = [text for name, sources in named.items() if name.startswith("data.") for text in listed(sources)]
        return [file for text in texts for file in local_files(text)]

    def streaming(self, key: str) -> str:
        """The option that tells `fetch_data` to stream `store/data/{key}`, or nothing."""
        return "--streaming" if self.of_key(key).data.streaming else ""

    def local_model(self, key: str) -> list[str]:
        """The local files `store/models/{key}` is made of."""
        return [file for text in listed(self.of_key(key).model.source) for file in local_files(text)]

    # directories of the store, by run
    def _key(self, kind: str, run: RunConfig) -> str:
        """The key of a run's data, tokens, model, tokenizer or check; hashed once."""
        if (kind, id(run)) not in self._keys:
            self._keys[kind, id(run)] = getattr(store, f"{kind}_key")(run)
        return self._keys[kind, id(run)]

    def data(self, run: RunConfig) -> str:
        return f"{self.store}/data/{self._key('data', run)}"

    def tokens(self, run: RunConfig) -> str:
        return f"{self.store}/tokens/{self._key('tokens', run)}"

    def model(self, run: RunConfig) -> str | None:
        """Where the run starts from; None for a new architecture."""
        if run.model.source is None or run.model.architecture is not None:
            return None
        return f"{self.store}/models/{self._key('model', run)}"

    def tokenizer(self, run: RunConfig) -> str:
        """Where the run's tokenizer lies: trained, or with the model of `model.source`."""
        if run.model.tokenizer is not None:
            return f"{self.store}/tokenizers/{self._key('tokenizer', run)}"
        return f"{self.store}/models/{self._key('model', run)}"

    # what a run's stages read
    def data_manifest(self, name: str) -> str:
        return f"{self.data(self.run(name))}/manifest.json"

    def tokens_manifest(self, name: str) -> str:
        return f"{self.tokens(self.run(name))}/manifest.json"

    def start(self, name: str) -> list[str]:
        """The manifests of the model and tokenizer a run starts from."""
        return [f"{directory}/manifest.json" for directory in dict.fromkeys(self._start(name).values())]

    def start_arguments(self, name: str) -> list[str]:
        """The same as arguments: --model and, where it does not lie with the model, --tokenizer."""
        return [text for option, directory in self._start(name).items() for text in (option, directory)]

    def _start(self, name: str) -> dict[str, str]:
        run = self.run(name)
        model, tokenizer = self.model(run), self.tokenizer(run)
        start = {"--model": model} if model else {}
        return start if tokenizer == model else {**start, "--tokenizer": tokenizer}

    def teacher(self, name: str) -> list[str]:
        """The manifest of a run's teacher: another run's export, or a model of the store; nothing without one."""
        run = self.run(name)
        teacher = store.with_teacher(run)
        if teacher is None:
            return []
        if run.method.kd.teacher in self.runs:
            return [f"{self.experiment}/{run.method.kd.teacher}/model/manifest.json"]
        return [f"{self.store}/models/{store.model_key(teacher)}/manifest.json"]

    def teacher_arguments(self, name: str) -> list[str]:
        """The same as arguments."""
        return [text for file in self.teacher(name) for text in ("--teacher", str(Path(file).parent))]

    def _teacher_problems(self, run: RunConfig) -> list[Problem]:
        teacher, seen = run.method.kd.teacher, [run.run]
        if run.method.name != "kd" or teacher is None:
            return []
        while teacher in self.runs:
            if teacher in seen:
                message = f"learns from itself: {' <- '.join([*seen, teacher])}: name another run, or a model"
                return [Problem(self.name, "method.kd.teacher", message, run.method.kd.teacher, run.run)]
            seen.append(teacher)
            method = self.runs[teacher].method
            teacher = method.kd.teacher if method.name == "kd" else None
        teacher = run.method.kd.teacher
        if teacher in self.runs or not is_missing(str(teacher)):
            return []
        there = did_you_mean(str(teacher), self.runs, "the runs are")
        message = f"no run of this experiment and no such file or directory (looked from {Path.cwd()}); {there}"
        return [Problem(self.name, "method.kd.teacher", message, teacher, run.run)]

    def trained(self, name: str) -> list[str]:
        """The summary of a run's training; nothing for an untouched model."""
        return [] if self.run(name).method.name == "none" else [f"{self.experiment}/{name}/train/summary.json"]

    def trained_arguments(self, name: str) -> list[str]:
        """The same as arguments."""
        return ["--train", f"{self.experiment}/{name}/train"] if self.trained(name) else []

    def chat_template(self, run: RunConfig) -> list[str]:
        """The file with the run's own chat template, if it has one."""
        return listed(run.model.chat_template)

    def chat_template_of_run(self, name: str) -> list[str]:
        return self.chat_template(self.run(name))

    def task_files(self, name: str) -> list[str]:
        """The files of config/tasks that define a run's tasks: their own, and what such files share."""
        return self._task_files(self.run(name))

    def check_task_files(self, key: str) -> list[str]:
        """The same for the runs whose data report is `store/checks/{key}`."""
        return self._task_files(self.of_key(key))

    def _task_files(self, run: RunConfig) -> list[str]:
        tasks = (*run.evaluate.tasks, *run.evaluate.extra_tasks)
        if tasks not in self._files_of_tasks:
            own = [self.tasks / f"{task}.yaml" for task in tasks]
            shared = [*self.tasks.glob("_*"), *self.tasks.glob("*.py")]
            self._files_of_tasks[tasks] = [str(path) for path in own + sorted(shared) if path.is_file()]
        return self._files_of_tasks[tasks]

    def config(self, name: str, stage: str) -> str:
        """The part of a run's config that `stage` is given, as JSON text."""
        return canonical_json(store.stage_config(self.run(name), stage))

    def resolved(self, name: str) -> str:
        """What a run's config.json says, as JSON text."""
        return canonical_json(self.run(name).resolved())

    # what the report reads
    def results(self, kind: str) -> list[str]:
        """The files of one kind of all runs, in the experiment's order."""
        files = {name: f"{self.experiment}/{name}" for name in self.runs}
        trained = [path for name, path in files.items() if self.trained(name)]
        evaluated = [path for name, path in files.items() if self._has_tasks(self.runs[name])]
        match kind:
            case "config":
                return [f"{path}/config.json" for path in files.values()]
            case "train":
                return [f"{path}/train/{file}" for path in trained for file in ("metrics.jsonl", "summary.json")]
            case "export":
                return [f"{path}/model/manifest.json" for path in files.values()]
            case "evaluate":
                return [f"{path}/eval/results.json" for path in evaluated]
            case "verify_serving":
                return [f"{path}/serve/parity.json" for path in files.values()]
            case "check":
                keys = dict.fromkeys(self._key("check", run) for name, run in self.runs.items() if self.trained(name))
                return [f"{self.store}/checks/{key}/manifest.json" for key in keys]
            case "store":
                directories = [d for name, run in self.runs.items() for d in (self.data(run), self.tokens(run))]
                shared = [f"{directory}/manifest.json" for directory in directories]
                return list(dict.fromkeys(shared + [file for name in self.runs for file in self.start(name)]))
        raise AssertionError(kind)

    def directories(self) -> list[str]:
        """Each run's folder."""
        return [f"{self.experiment}/{name}" for name in self.runs]

    def resources(self, stage: str, wildcards: Any) -> StageResources | TrainResources:
        """What a job asks of the machine: by its run, or by the first run that uses its key."""
        if name := getattr(wildcards, "run", None):
            run = self.run(name)
        elif key := getattr(wildcards, "key", None):
            run = self.of_key(key)
        else:
            run = next(iter(self.runs.values()))
        return getattr(run.resources, stage)

    def gpus(self, stage: str, wildcards: Any) -> int:
        """GPUs of each node that a job runs on."""
        asked = self.resources(stage, wildcards)
        if asked.gpu == "auto":
            return self._world_size(wildcards) // self.nodes(stage, wildcards)
        return int(asked.gpu)

    def nodes(self, stage: str, wildcards: Any) -> int:
        """Nodes that a job runs on."""
        return getattr(self.resources(stage, wildcards), "nodes", 1)

    def processes(self, wildcards: Any) -> int:
        """Training processes on each node."""
        return self._world_size(wildcards) // self.nodes("train", wildcards)

    def launch_arguments(self, wildcards: Any) -> str:
        """Machine settings of training as arguments. They change no result, so they are no parameter of the rule."""
        asked = self.run(wildcards.run).resources.train
        arguments = f"--nodes {asked.nodes} --max-requeues {asked.max_requeues} --stop-before {asked.stop_before}"
        return arguments + (
            f" --network-interface {shlex.quote(interface)}" if (interface := asked.network_interface) else ""
        )

    def _world_size(self, wildcards: Any) -> int:
        run = self.run(wildcards.run)
        return 1 if run.method.name == "none" else run.parallelism.world_size

    @staticmethod
    def _has_tasks(run: RunConfig) -> bool:
        return bool(run.evaluate.tasks or run.evaluate.extra_tasks)


def _named_sources(run: RunConfig) -> dict[str, str | list[str] | None]:
    """What may be local files: dotted key -> its value."""
    data = run.data
    return {
        "model.source": run.model.source,
        "data.source": data.source,
        "data.validation_source": data.validation_source,
        "data.test_source": data.test_source,
        "data.answers": data.answers,
    }
