"""What is asked of one architecture, on the ranks of a running process group, all through the engine's own code.

The reference is transformers' own model of the same directory in one process, given one document at a time: no
padding, no packing, no sharding, all logits at once.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dayzero.config import Lora, Method, Train
from dayzero.data.loader import TrainBatches
from dayzero.data.tokens import TokenRows
from dayzero.engine import distributed
from dayzero.engine.consolidate import write_model
from dayzero.engine.export import TOLERANCE, logit_difference, logits_of, reload, streamed_logits
from dayzero.engine.gathering import float32_logits, whole_weights
from dayzero.engine.lora import save_adapter
from dayzero.engine.model import ModelSource
from dayzero.engine.packing import any_leak, require_causal
from dayzero.engine.parallel_dims import ParallelDims
from dayzero.engine.parallel_model import ParallelModel
from dayzero.engine.passes import training_logits
from dayzero.engine.tiny_copy import VOCAB_SIZE, tiny_configs
from dayzero.engine.trained_weights import TrainedWeights
from dayzero.engine.trainer import Trainer
from dayzero.errors import ConfigError
from dayzero.files import write_json
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.token_store import write_token_store
from tests.whole_weights import all_whole_weights

SEED = 4
STEPS = 4
LENGTHS = (29, 11, 20, 17)
"""Tokens of the documents: ragged, so that rows are padded; windows and chunks of the tiny models are 8 long."""

LOSS = 1e-4
"""Largest difference of a loss or a gradient norm from the reference, as a share of it."""

GRADIENT = 1e-3
"""The same of a gradient's norm: one gradient of a mixture moves where two experts score nearly the same."""

HALF = 5e-2
"""The same of a loss in bfloat16."""


class Differs(ValueError):
    """A number is not what it has to be."""


def require(what: str, got: float, want: float, tolerance: float) -> None:
    """Raise `Differs` where `got` is not `want` within a share of it."""
    if not abs(got - want) <= tolerance * abs(want):
        raise Differs(f"{what} {got:.6g}, not {want:.6g}")


class Subject:
    """One architecture as a tiny random model, its rows, and what the checks share."""

    def __init__(self, model_type: str, folder: Path) -> None:
        self.model_type, self.folder = model_type, folder
        self.directory = folder / "base"
        self.documents = documents()
        self.asked = False
        self.refusal: ConfigError | None = None

    def make(self) -> str:
        """Build the tiny model, write it as a directory, and the rows beside it. Returns a remark."""
        said: list[str] = []
        for config in tiny_configs(CONFIG_MAPPING[self.model_type]()):
            try:
                torch.manual_seed(SEED)
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
                sum_of_losses(model, self.documents).backward()
                break
            except Exception as error:
                said.append(explain(error))
        else:
            raise ValueError(f"no tiny config of it works: {' | '.join(dict.fromkeys(said))}")
        self.parameters = sum(p.numel() for p in model.parameters())
        if distributed.rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            with torch.no_grad():
                for parameter in model.parameters():  # what starts at zero or one would hide a mistake
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
            model.save_pretrained(self.directory)
            write_rows(self.folder / "rows", self.documents)
        distributed.barrier()
        return f"{self.parameters // 1000}k parameters"

    def plain(self) -> PreTrainedModel:
        """The model as transformers loads it."""
        return AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).train()

    @cached_property
    def reference(self) -> tuple[float, float]:
        """(loss of a label token, norm of its gradient) of the untrained model."""
        model = self.plain()
        model.config.use_cache = False
        loss = sum_of_losses(model, self.documents) / sum(len(d) - 1 for d in self.documents)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return loss.item(), torch.nn.utils.get_total_norm(gradients).item()

    def trainer(self, name: str, method: str = "full", tp: int = 1, **train: Any) -> Trainer:
        """The engine's trainer of the tiny model on all ranks."""
        ranks = distributed.world_size()
        settings: dict[str, Any] = {
            "max_steps": STEPS,
            "global_batch_size": len(LENGTHS),
            "local_batch_size": len(LENGTHS) // 2,
            "precision": "fp32",
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"every": STEPS // 2, "keep_last": 2},
        }
        model = ParallelModel(
            source=ModelSource(directory=self.directory),
            method=Method(name=method, lora=Lora(rank=4)),  # type: ignore[arg-type]
            train=Train(**{**settings, **train}),
            dims=ParallelDims(world_size=ranks, strategy="fsdp2", tp=tp, dp_shard=ranks // tp, dp_replicate=1),
            seed=SEED,
            device=distributed.local_device(),
        )
        trainer = Trainer(model=model, directory=self.folder / name, identity={"name": name}, max_steps=STEPS)
        self.require_causal(model)
        return trainer

    def require_causal(self, model: ParallelModel) -> None:
        """What the train stage asks of every model, asked once. Raises `ConfigError`."""
        if not self.asked:
            self.asked = True
            try:
                require_causal(model)
            except ConfigError as error:
                self.refusal = error
        if self.refusal:
            raise self.refusal

    def batches(self, trainer: Trainer, start_step: int = 0) -> TrainBatches:
        """All documents in every step, one in a row."""
        return TrainBatches(
            TokenRows(self.folder / "rows"),
            global_batch_size=trainer.train.global_batch_size,
            local_batch_size=trainer.train.local_batch_size,
            dp_rank=trainer.dims.dp_rank(distributed.rank()),
            dp_size=trainer.dims.dp,
            seed=SEED,
            max_steps=STEPS,
            num_epochs=None,
            start_step=start_step,
            num_workers=0,
        )

    def steps(self, trainer: Trainer, count: int) -> list[dict[str, Any]]:
        """The records of the first `count` steps, without checkpoints."""
        found = []
        for batch in self.batches(trainer):
            record = trainer.train_step(batch)
            assert record
            found.append(record)
            if len(found) == count:
                break
        return found

    @cached_property
    def trained(self) -> Trainer:
        """The model after all steps of full training, with checkpoints."""
        trainer = self.trainer("full")
        trainer.fit(lambda start: self.batches(trainer, start), None)
        return trainer

    @cached_property
    def adapted(self) -> Trainer:
        """The model after two steps of LoRA."""
        trainer = self.trainer("lora", "lora")
        before = all_whole_weights(trainer.model)
        self.adapted_before = {name: value.clone() for name, value in before.items()}
        self.adapted_records = self.steps(trainer, 2)
        return trainer

    def close(self) -> None:
        """Forget the models."""
        for name in ("trained", "adapted", "reference", "adapted_before"):
            self.__dict__.pop(name, None)
        gc.collect()
        distributed.barrier()
        if distributed.rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


def documents() -> list[Tensor]:
    """[T] token ids of each document; no ids that are special in tiny models."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]


def write_rows(path: Path, documents: list[Tensor]) -> None:
    write_token_store(path, [(d.tolist(), [True] * len(d)) for d in documents], [[i] for i in range(len(documents))])


def sum_of_losses(model: PreTrainedModel, documents: list[Tensor]) -> Tensor:
    """The sum of all documents' token losses by the model's own logits, each document alone."""
    total = torch.zeros(())
    for document in documents:
        logits = model(input_ids=document.unsqueeze(0), use_cache=False).logits[0]  # [T, V]
        total = total + F.cross_entropy(logits[:-1].float(), document[1:], reduction="sum")
    return total


def full(subject: Subject) -> str:
    """All steps run, the loss falls."""
    losses = [record["loss"] for record in subject.trained.metrics.records]
    if len(losses) != STEPS and distributed.rank() == 0:
        raise Differs(f"{len(losses)} of {STEPS} steps")
    if distributed.rank() == 0 and not losses[-1] < losses[0]:
        raise Differs(f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    return ""


def loss(subject: Subject) -> str:
    """The first step's loss and gradient norm are those of the model's own logits."""
    value, norm = subject.reference
    _ = subject.trained
    if distributed.rank() == 0:
        first = subject.trained.metrics.records[0]
        require("loss", first["loss"], value, LOSS)
        require("gradient norm", first["grad_norm"], norm, GRADIENT)
    return ""


def lora(subject: Subject) -> str:
    """Adapters start at the base model, only they move, and all of them do."""
    trainer = subject.adapted
    first = subject.adapted_records[0]
    require("loss", first["loss"], subject.reference[0], LOSS)
    after = all_whole_weights(trainer.model)
    if distributed.rank() == 0:
        moved = {n for n, before in subject.adapted_before.items() if not torch.equal(before, after[n])}
        if frozen := sorted(n for n in moved if "lora_" not in n):
            raise Differs(f"frozen weights moved: {frozen[0]}")
        still = sorted(n for n in after if "lora_B" in n and n not in moved)
        if still:
            return f"{len(still)} adapters saw no token, e.g. {still[0]}"
    return ""


def merge(subject: Subject) -> str:
    """The adapters merged into the base weights, written and reloaded: the same to the bit, and training's logits."""
    return _export(subject, subject.adapted, "lora")


def export(subject: Subject) -> str:
    """The trained weights, written and reloaded: the same to the bit, and training's logits."""
    return _export(subject, subject.trained, "full")


def _export(subject: Subject, trainer: Trainer, method: str) -> str:
    """What the train and export stages do, in their order."""
    probe = torch.cat(subject.documents)[:24].unsqueeze(0)
    logits = float32_logits(trainer.model, probe, torch.arange(24).unsqueeze(0))
    adapters = whole_weights(trainer.model) if method == "lora" else {}
    if distributed.rank() != 0:
        return ""
    place = trainer.directory
    if method == "lora":
        trained = trainer.model.weights
        save_adapter(place / "adapter", trained.method.lora, adapters, str(subject.directory), trained.tied)
    write_json(place / "summary.json", {"checkpoint": f"checkpoints/step_{STEPS}"})
    weights = TrainedWeights(trainer.model.source, None, trainer.model.method, SEED, place)
    streamed = streamed_logits(weights.model, weights.read, probe)
    if not (off := logit_difference(streamed, logits)) <= TOLERANCE:
        raise Differs(f"exported logits are off by {off:.2g}")
    directory = place / "model"
    directory.mkdir()
    write_model(directory, weights.model, weights.read, torch.float32, "5GB", weights.weights.tied)
    reloaded = reload(directory)
    if differ := [n for n, p in reloaded.named_parameters() if not torch.equal(p, weights.read(n))]:
        raise Differs(f"reloaded weights differ: {differ[0]}")
    if not (off := logit_difference(logits_of(reloaded, probe), streamed)) <= TOLERANCE:
        raise Differs(f"reloaded logits are off by {off:.2g}")
    return ""


def packing(subject: Subject) -> str:
    """Documents of one row do not reach one another, or the probe says that they do."""
    model = subject.trained.model
    leak = any_leak(model)
    row = torch.cat(subject.documents).unsqueeze(0)
    positions = torch.cat([torch.arange(len(d)) for d in subject.documents]).unsqueeze(0)
    try:
        packed = training_logits(model, row, positions)[0]
    except Exception:
        if leak is None:
            raise
        return f"padded: leaks {leak:.1g}"
    places = [torch.arange(len(d)).unsqueeze(0) for d in subject.documents]
    alone = [training_logits(model, d.unsqueeze(0), p)[0] for d, p in zip(subject.documents, places, strict=True)]
    off = ((packed - torch.cat(alone)).abs().max() / torch.cat(alone).abs().max()).item()
    if leak is None and not off <= LOSS:
        raise Differs(f"SILENT LEAK: packed logits are off by {off:.2g} and the probe found nothing")
    return "" if leak is None else f"padded: leaks {leak:.1g}"


def bf16(subject: Subject) -> str:
    """Two steps in bfloat16; the first loss is that of float32 but for rounding."""
    first, second = subject.steps(subject.trainer("bf16", precision="bf16"), 2)
    require("loss", first["loss"], subject.reference[0], HALF)
    if not second["loss"] < first["loss"]:
        raise Differs(f"the loss went from {first['loss']:.4f} to {second['loss']:.4f}")
    return ""


def checkpointing(subject: Subject) -> str:
    """A step that computes each layer again in the backward pass: the same loss and gradient."""
    (first,) = subject.steps(subject.trainer("checkpointing", activation_checkpointing="full"), 1)
    value, norm = subject.reference
    require("loss", first["loss"], value, LOSS)
    require("gradient norm", first["grad_norm"], norm, GRADIENT)
    return ""


def resume(subject: Subject) -> str:
    """Continued from the middle, training ends with the same weights to the bit."""
    want = all_whole_weights(subject.trained.model)
    records = [record["loss"] for record in subject.trained.metrics.records]
    if distributed.rank() == 0:
        place = subject.folder / "resumed" / "checkpoints"
        place.mkdir(parents=True)
        shutil.copytree(subject.trained.checkpoints / f"step_{STEPS // 2}", place / f"step_{STEPS // 2}")
    distributed.barrier()
    trainer = subject.trainer("resumed")
    trainer.identity = subject.trained.identity
    trainer.resume()
    if trainer.step != STEPS // 2:
        raise Differs(f"continued from step {trainer.step}")
    trainer.fit(lambda start: subject.batches(trainer, start), None)
    got = all_whole_weights(trainer.model)
    if distributed.rank() == 0:
        losses = [record["loss"] for record in trainer.metrics.records][-(STEPS // 2) :]
        if losses != records[-(STEPS // 2) :]:
            raise Differs(f"losses {losses}, not {records[-(STEPS // 2) :]}")
        if differ := [name for name in want if not torch.equal(want[name], got[name])]:
            raise Differs(f"other weights: {differ[0]}")
    return ""


def tp(subject: Subject) -> str:
    """A step split over tp 2: the same loss and gradient."""
    (first,) = subject.steps(subject.trainer("tp", tp=2), 1)
    value, norm = subject.reference
    require("loss", first["loss"], value, LOSS)
    require("gradient norm", first["grad_norm"], norm, GRADIENT)
    return ""


CHECKS: dict[str, Callable[[Subject], str]] = {
    check.__name__: check for check in (full, loss, lora, merge, packing, bf16, checkpointing, export, resume, tp)
}
"""In the order in which they run."""


def run_check(check: Callable[[Subject], str], subject: Subject) -> dict[str, str]:
    """{status, why}: pass, fail, or refused where the engine says in one line that it cannot."""
    try:
        why = check(subject)
        return {"status": "pass", "why": why}
    except ConfigError as error:
        return {"status": "refused", "why": explain(error)}
    except Exception as error:
        return {"status": "fail", "why": explain(error)}


def explain(error: BaseException) -> str:
    """One line: the error, and where it was raised. What is for users is whole, with its remedy."""
    at, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        at = f"{'/'.join(Path(code.co_filename).parts[-2:])}:{trace.tb_lineno}"
        trace = trace.tb_next
    said = " ".join(str(error).split())
    return said if isinstance(error, Differs | ConfigError) else f"{type(error).__name__}: {said[:300]} ({at})"
