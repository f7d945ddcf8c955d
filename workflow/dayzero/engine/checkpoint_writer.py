"""Writing checkpoints while training goes on.

`save` copies this rank's shards into buffers on the CPU, which are kept from one checkpoint to the next (page-locked
beside a GPU), and a thread writes the copy. Training waits for the copy alone, and for the checkpoint before where that
is still being written: there is one at a time. The order is the same on all ranks:

copy -> every rank writes `step_N.tmp/` -> rank 0 adds `trainer.json`, renames it to `step_N/`, removes what is not kept

The thread talks to the other ranks through a process group of its own, so that its collectives never mix with those of
training. Whatever fails on one rank fails on all of them: each raises the same error at the same step, and none waits
for ever.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import WriteResult
from torch.distributed.checkpoint.staging import StateDictStager
from torch.futures import Future

from dayzero.config import Checkpoint
from dayzero.console import log
from dayzero.engine.checkpoint import prune, sync_directory
from dayzero.engine.distributed import rank
from dayzero.errors import one_line
from dayzero.files import write_json


class CheckpointFailed(ValueError):
    """A checkpoint could not be written; earlier ones are untouched."""


class _Storage(dcp.FileSystemWriter):
    """Writes to a folder. A full disk is said as such: torch's serialiser hides it behind an error of its own."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise (cause or error) from None


class CheckpointWriter:
    """Writes the checkpoints of one run into `directory`. All ranks make one and call it together.

    As a context it leaves no write unfinished: at the end of the block it waits, and raises what went wrong. Where the
    block itself fails, that error goes on and the writer's is only logged.
    """

    def __init__(self, directory: Path, config: Checkpoint) -> None:
        self.directory, self.config = directory, config
        self._on_gpu = torch.cuda.is_available()
        self._device = torch.cuda.current_device() if self._on_gpu else None
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        # not torch's DefaultStager, which in torch 2.11 empties this one after its first copy
        self._stager = StateDictStager(pin_memory=self._on_gpu)
        self._thread: threading.Thread | None = None
        self._error: CheckpointFailed | None = None

    @property
    def failed(self) -> bool:
        """Whether the write going on in the thread has failed; the next `save` or `wait` raises its error."""
        return self._error is not None

    def save(self, step: int, state: dict[str, Tensor], trainer: dict[str, Any]) -> None:
        """Write `directory/step_N` with `state` and `trainer` (JSON values, with `validation_losses`).

        Returns as soon as `state` may change again. Raises `CheckpointFailed`, for the checkpoint before too.
        """
        self.wait()
        if not self.config.asynchronous:
            self._write(step, state, trainer)
            self._raise_error()
            return
        staged = self._stager.stage(state, non_blocking=self._on_gpu)
        if self._on_gpu:
            torch.cuda.synchronize()
        self._thread = threading.Thread(
            target=self._write, args=(step, staged, trainer), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is complete. Raises `CheckpointFailed`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise_error()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is not None and not issubclass(kind, Exception):
            return  # interrupted for the second time: leave at once, the unfinished folder is removed at the next start
        try:
            self.wait()
        except CheckpointFailed as error:
            if kind is None:
                raise
            log.error("%s", error)

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, state: dict[str, Tensor], trainer: dict[str, Any]) -> None:
        final, temporary = self.directory / f"step_{step}", self.directory / f"step_{step}.tmp"

        def begin() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def complete() -> None:
            files = {entry.name: entry.stat().st_size for entry in sorted(temporary.iterdir())}
            write_json(temporary / "trainer.json", {"step": step, "files": files, **trainer})
            sync_directory(temporary)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            sync_directory(self.directory)
            prune(self.directory, self.config.keep_last, self.config.keep_best, trainer["validation_losses"])

        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # each thread has its own, the first of the node at its start
            self._on_rank_0(begin)
            dcp.save(state, storage_writer=_Storage(temporary), process_group=self._group, no_dist=self._group is None)
            self._on_rank_0(complete)
        except BaseException as error:  # what torch raises for another rank's failure is no Exception
            if rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            self._error = CheckpointFailed(f"the checkpoint of step {step} is not written: {_why(error, temporary)}")

    def _on_rank_0(self, do: Callable[[], None]) -> None:
        """`do()` on rank 0; its error, if there is one, on all ranks."""
        error: OSError | RuntimeError | None = None
        if rank() == 0:
            try:
                do()
            except OSError as failure:
                error = failure
            except Exception as failure:
                error = RuntimeError(one_line(failure))  # any exception can be raised, not any can be sent
        said = [error]
        if self._group is not None:
            dist.broadcast_object_list(said, src=0, group=self._group)
        if said[0] is not None:
            raise said[0]


def _why(error: BaseException, directory: Path) -> str:
    """The cause in one line: which rank, and for trouble with the disk where and the remedy."""
    who = ""
    if failures := getattr(error, "failures", None):
        first = min(failures)
        who, error = f"rank {first}: ", failures[first][0]
    if isinstance(error, OSError) and error.filename is None:
        error = OSError(error.errno, error.strerror, str(directory))
    elif "No space left on device" in str(error) and not isinstance(error, OSError):
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
    return who + (one_line(error) if isinstance(error, Exception) else f"{type(error).__name__}: {error}")
