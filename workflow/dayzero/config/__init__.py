"""Every key a run can set, with its type, unit and default: the single source of the schema, the defaults and the docs.

A field's docstring says what it means, its unit and its "off" value. Values are never converted in silence: a key that
is not here, a text where a number belongs (YAML reads ``1e-4`` as text) or a bad combination is refused. How recipe,
experiment, run and command line are merged into one `RunConfig` stands in `experiment.py`.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import NonNegativeInt, ValidationError

from dayzero.config.after_training import Evaluate, Export, Serving
from dayzero.config.data import Data, DataCheck, Tokenize
from dayzero.config.method import Kd, Lora, Method
from dayzero.config.model import Model, TokenizerTraining
from dayzero.config.optimizer import Adafactor, LrScheduler, Muon, Optimizer
from dayzero.config.parallelism import Parallelism
from dayzero.config.resources import Resources, StageResources, TrainResources
from dayzero.config.section import Section
from dayzero.config.train import Checkpoint, Ema, Fp8, Train
from dayzero.errors import ConfigError

__all__ = [
    "Adafactor",
    "Checkpoint",
    "Data",
    "DataCheck",
    "Ema",
    "Evaluate",
    "Export",
    "Fp8",
    "Kd",
    "Lora",
    "LrScheduler",
    "Method",
    "Model",
    "Muon",
    "Optimizer",
    "Parallelism",
    "Resources",
    "RunConfig",
    "Serving",
    "StageResources",
    "Tokenize",
    "TokenizerTraining",
    "Train",
    "TrainResources",
]


class RunConfig(Section):
    """One run: everything that decides its result, plus `resources`, which does not."""

    experiment: str
    """The experiment's name: its file's name without .yaml."""
    run: str
    """The run's name within the experiment."""
    seed: NonNegativeInt = 0
    """Seed of weights, adapters, dropout and the order of rows."""
    model: Model = Model()
    data: Data = Data()
    data_check: DataCheck = DataCheck()
    tokenize: Tokenize = Tokenize()
    method: Method = Method()
    train: Train = Train()
    parallelism: Parallelism = Parallelism()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()
    serving: Serving = Serving()
    resources: Resources = Resources()

    @classmethod
    def from_resolved(cls, config: dict[str, Any], where: str) -> RunConfig:
        """The run that `resolved` made `config` of; ConfigError, naming `where` it stands, for anything else."""
        try:
            return cls.model_validate_json(json.dumps(config))
        except ValidationError as error:
            mistake = error.errors()[0]
            key = ".".join(map(str, mistake["loc"]))
            raise ConfigError(
                f"{where}: {key}: {mistake['msg']}: make it again with the stage resolve_config"
            ) from None

    def resolved(self) -> dict[str, Any]:
        """What config.json holds: every key but the machine settings."""
        return self.model_dump(mode="json", exclude={"resources"})
