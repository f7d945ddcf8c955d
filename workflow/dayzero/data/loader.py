"""Batches as a pure function of (seed, step): a resumed run continues exactly, with no loader state to save.

Sample k of a run is the row at place `k % R` of the order of (seed, epoch `k // R`), see shuffle.py. The global batch
of step s is samples [s * global_batch_size, (s + 1) * global_batch_size). So its rows depend neither on the number of
ranks nor on the local batch size. Within the global batch rows are sorted by length and dealt in blocks of
`local_batch_size`, so that a micro-batch holds rows of like length (little padding) and the ranks get like work.

Shapes: B rows of a micro-batch, T tokens, R rows of the split.
"""

from __future__ import annotations

import math
import mmap
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from dayzero.console import log
from dayzero.data.mixing import Mix
from dayzero.data.shuffle import Order
from dayzero.data.tokens import FILL, IGNORE, TokenRows
from dayzero.errors import ConfigError
from dayzero.parent import end_with_parent


@dataclass
class Batch:
    """One rank's share of a global batch."""

    step: int
    """From 0; the state after this step has seen step + 1 batches."""
    epoch: float
    """Passes over the rows when this batch is done."""
    micro_batches: list[dict[str, torch.Tensor]]
    """Each with `input_ids`, `labels` (already shifted) and `position_ids`, all int64 [B, T], and `lengths` [B], the
    tokens of each row, padding left out."""
    row_ids: list[int]
    """Source rows of the whole global batch, all ranks: indices into the split's Parquet file."""
    num_label_tokens: int
    """Supervised tokens of this rank."""
    num_tokens: int
    """Tokens of this rank, padding left out."""


@dataclass
class _Flat:
    """A batch as loader processes make it: plain arrays, where tensors would each open shared memory."""

    step: int
    epoch: float
    arrays: Sequence[NDArray[np.int32]]
    """Input ids, labels and position ids of all micro-batches end to end."""
    widths: list[int]
    """T of each micro-batch."""
    lengths: NDArray[np.int64]
    """[micro-batches, B] tokens of each row, padding left out."""
    local_batch_size: int
    row_ids: list[int]
    num_label_tokens: int
    num_tokens: int

    def batch(self) -> Batch:
        """The same arrays as tensors."""
        micro_batches = []
        at = 0
        for width, lengths in zip(self.widths, self.lengths, strict=True):
            shape = self.local_batch_size, width
            part = slice(at, at + self.local_batch_size * width)
            at = part.stop
            tensors = [torch.from_numpy(array[part]).view(shape).long() for array in self.arrays]
            tensors.append(torch.from_numpy(lengths))
            micro_batches.append(dict(zip(("input_ids", "labels", "position_ids", "lengths"), tensors, strict=True)))
        return Batch(self.step, self.epoch, micro_batches, self.row_ids, self.num_label_tokens, self.num_tokens)


def steps_of(num_rows: int, global_batch_size: int, *, max_steps: int | None, num_epochs: float | None) -> int:
    """Optimizer steps of a run: `max_steps`, or those of `num_epochs` passes over `num_rows`, the last perhaps short.

    Raises ConfigError unless exactly one of the two is given.
    """
    if (max_steps is None) == (num_epochs is None):
        raise ConfigError(f"train.max_steps is {max_steps} and train.num_epochs {num_epochs}: set exactly one of them")
    return max_steps or math.ceil(_samples(num_rows, num_epochs) / global_batch_size)


def check_rows(rows: TokenRows, dp_size: int) -> None:
    """Raise ConfigError where there are fewer rows than data-parallel ranks."""
    if len(rows) < dp_size:
        raise ConfigError(
            f"{dp_size} data-parallel ranks for only {len(rows)} row(s) of tokens in {rows.path}: use fewer ranks "
            "(parallelism.dp_shard, dp_replicate), more data, or a smaller tokenize.seq_len"
        )


MESSAGE_TOKENS = 2**18
"""Loader processes hand over about so many tokens at a time, small batches several together."""
MESSAGES_AHEAD = 2
"""Messages that each loader process makes before they are asked for."""


class _Batches:
    """What training and validation share: `self[step]` is this rank's batch; iterating walks `steps`."""

    def __init__(self, rows: TokenRows, local_batch_size: int, dp_rank: int, dp_size: int, num_workers: int) -> None:
        assert 0 <= dp_rank < dp_size
        self.rows, self.local_batch_size = rows, local_batch_size
        self.dp_rank, self.dp_size, self.num_workers = dp_rank, dp_size, num_workers
        self.steps = range(0)
        self.rows_per_step = local_batch_size

    def __len__(self) -> int:
        """Batches an iteration yields."""
        return len(self.steps)

    def __getitem__(self, step: int) -> Batch:
        return self._make(step).batch()

    def __iter__(self) -> Iterator[Batch]:
        if not self.num_workers:
            return map(self.__getitem__, self.steps)
        tokens = max(self.rows_per_step * self.rows.num_tokens // max(len(self.rows), 1), 1)
        together = max(MESSAGE_TOKENS // tokens, 1)
        slots = _slots(
            self.num_workers * MESSAGES_AHEAD + 1,  # those that are made or wait, and the one that is read
            together * self.rows_per_step * max(self.rows.longest(), 1),
        )
        messages = [self.steps[i : i + together] for i in range(0, len(self.steps), together)]
        # A generator of its own: DataLoader would draw its workers' seed from torch's global one, which a resumed run
        # would then find in another state.
        workers = DataLoader(
            _Worker(self, slots),
            batch_size=None,
            sampler=[(number % len(slots), steps) for number, steps in enumerate(messages)],
            num_workers=self.num_workers,
            prefetch_factor=MESSAGES_AHEAD,
            multiprocessing_context="fork",  # the slots are the same memory in a copy of this process
            collate_fn=_identity,
            worker_init_fn=partial(_end_with, os.getpid()),
            generator=torch.Generator().manual_seed(0),
        )
        with _requests_to_stop_held_back():
            return _received(iter(workers), slots)

    def _make(self, step: int) -> _Flat:
        raise NotImplementedError

    def _flat(self, step: int, epoch: float, rows: NDArray[np.int64], shares: NDArray[np.int64]) -> _Flat:
        """A batch of all `rows`, of which this rank has one micro-batch for each of `shares`, [micro-batches, B]."""
        mine = shares.ravel()
        lengths = self.rows.lengths_of(mine).reshape(shares.shape)
        widths = np.maximum(lengths.max(axis=1), 1).tolist()
        arrays = self.rows.batch(mine, np.repeat(widths, shares.shape[1]))
        return _Flat(
            step=step,
            epoch=epoch,
            arrays=arrays,
            widths=widths,
            lengths=lengths,
            local_batch_size=self.local_batch_size,
            row_ids=self.rows.source_rows(rows),
            num_label_tokens=int(np.count_nonzero(arrays[1] != IGNORE)),
            num_tokens=int(lengths.sum()),
        )


@contextmanager
def _requests_to_stop_held_back() -> Iterator[None]:
    """Processes that are forked inside the block never see a request to stop. A batch system sends it to every process:
    the rank would fail in mid-step if they ended before it; they end with it as they are."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _slots(count: int, tokens: int) -> NDArray[np.int32]:
    """Memory that loader processes share with this one, [count, 3, tokens]: what lies there need not go through a pipe,
    which holds so little that reader and writer would wait for each other many times a message. What is never written
    to takes no memory."""
    return np.frombuffer(mmap.mmap(-1, count * 3 * tokens * 4), np.int32).reshape(count, 3, tokens)


class _Worker(Dataset[list[_Flat]]):
    """What a loader process is given: asked for (a slot, some steps), it makes their batches, whose arrays it leaves in
    the slot one after another."""

    def __init__(self, batches: _Batches, slots: NDArray[np.int32]) -> None:
        self.batches, self.slots = batches, slots

    def __getitem__(self, asked: tuple[int, range]) -> list[_Flat]:
        slot, steps = asked
        message = []
        start = 0
        for flat in map(self.batches._make, steps):
            stop = start + len(flat.arrays[0])
            for place, array in zip(self.slots[slot], flat.arrays, strict=True):
                place[start:stop] = array
            message.append(replace(flat, arrays=()))
            start = stop
        return message


def _received(messages: Iterator[list[_Flat]], slots: NDArray[np.int32]) -> Iterator[Batch]:
    """The batches of all messages. DataLoader has a slot written to again only when the message after it is asked for,
    and then its batches have been copied."""
    for number, message in enumerate(messages):
        start = 0
        for flat in message:
            stop = start + flat.local_batch_size * sum(flat.widths)
            yield replace(flat, arrays=list(slots[number % len(slots), :, start:stop])).batch()
            start = stop


class TrainBatches(_Batches):
    """The training batches of one rank.

    Args:
        rows: the training split.
        global_batch_size: rows of an optimizer step over all ranks and micro-batches; a multiple of
            local_batch_size * dp_size.
        local_batch_size: rows of a micro-batch.
        dp_rank, dp_size: this data-parallel rank and their number.
        seed: of the order of rows.
        max_steps: steps of the whole run; batches run on into the next epoch. Exactly one of this and num_epochs.
        num_epochs: passes over the rows; the last batch may be short and is then filled with empty rows, so that all
            ranks have equally many micro-batches of equal size.
        start_step: steps already done; iterating starts there.
        num_workers: loader processes. 0: none, batches are made when asked for.
        mix: draws the rows of several sources by weight; an epoch is then as many samples as there are rows.

    Raises ConfigError where there are fewer rows than ranks.
    """

    def __init__(
        self,
        rows: TokenRows,
        *,
        global_batch_size: int,
        local_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
        max_steps: int | None = None,
        num_epochs: float | None = None,
        start_step: int = 0,
        num_workers: int = 0,
        mix: Mix | None = None,
    ) -> None:
        super().__init__(rows, local_batch_size, dp_rank, dp_size, num_workers)
        self.mix = mix
        self._order = Order(len(rows))
        assert global_batch_size % (local_batch_size * dp_size) == 0
        check_rows(rows, dp_size)
        self.global_batch_size, self.seed = global_batch_size, seed
        self.rows_per_step = global_batch_size // dp_size
        self.num_steps = steps_of(len(rows), global_batch_size, max_steps=max_steps, num_epochs=num_epochs)
        """Steps of the whole run."""
        self.num_samples = self.num_steps * global_batch_size if max_steps else _samples(len(rows), num_epochs)
        self.steps = range(start_step, self.num_steps)
        if global_batch_size > len(rows) and dp_rank == 0:
            log.warning(
                "train.global_batch_size %d exceeds the %d rows of tokens: rows repeat in a batch or it stays short",
                global_batch_size,
                len(rows),
            )

    def _make(self, step: int) -> _Flat:
        rows = self.global_batch(step)
        # Longest first, equal lengths as sampled; FILL rows are empty and come last.
        blocks = rows[np.argsort(-self.rows.lengths_of(rows), kind="stable")].reshape(
            -1, self.dp_size, self.local_batch_size
        )
        # The ranks take turns in having the longer block of a micro-batch.
        ranks = [self.dp_rank if m % 2 == 0 else self.dp_size - 1 - self.dp_rank for m in range(len(blocks))]
        epoch = min((step + 1) * self.global_batch_size, self.num_samples) / len(self.rows)
        return self._flat(step, epoch, rows, blocks[np.arange(len(blocks)), ranks])

    def global_batch(self, step: int) -> NDArray[np.int64]:
        """[global_batch_size] row indices of step `step` in the order they are sampled, FILL where there is none."""
        samples = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        if self.mix is not None:
            return np.where(samples < self.num_samples, self.mix.rows(samples, self.seed), FILL)
        epochs, places = np.divmod(samples, len(self.rows))
        rows = np.empty_like(samples)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._order.rows(places[here], self.seed, int(epoch))
        return np.where(samples < self.num_samples, rows, FILL)


class ValidationBatches(_Batches):
    """Every row once, in order, one micro-batch a step; a short last step is filled with empty rows."""

    def __init__(
        self,
        rows: TokenRows,
        *,
        local_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        super().__init__(rows, local_batch_size, dp_rank, dp_size, num_workers)
        self.steps = range(math.ceil(len(rows) / (local_batch_size * dp_size)))

    def _make(self, step: int) -> _Flat:
        size = self.local_batch_size * self.dp_size
        rows = np.arange(step * size, (step + 1) * size)
        epoch = min((step + 1) * size, len(self.rows)) / len(self.rows)
        rows = np.where(rows < len(self.rows), rows, FILL)
        return self._flat(step, epoch, rows, rows.reshape(self.dp_size, -1)[self.dp_rank : self.dp_rank + 1])


def _samples(num_rows: int, num_epochs: float | None) -> int:
    assert num_epochs is not None
    return max(1, round(num_rows * num_epochs))


def _end_with(rank: int, _: int) -> None:
    """torch lets a loader process notice that its rank is gone, but not while it hands over what nobody takes."""
    end_with_parent(rank)


def _identity(batch: Any) -> Any:
    return batch
