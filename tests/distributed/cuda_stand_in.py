"""What Megatron-FSDP asks of torch.cuda, done by a CPU: all work is in order there, so streams and events do nothing.

And gloo's reduce-scatter, which has no mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist


class Stream:
    device = torch.device("cpu")

    def wait_stream(self, _: Stream) -> None: ...

    def wait_event(self, _: object) -> None: ...

    def record_event(self) -> object:
        return object()


@contextmanager
def cuda_stand_in() -> Iterator[None]:
    """While active, Megatron-FSDP runs on the CPU with gloo; nothing happens where there is a GPU."""
    if torch.cuda.is_available():
        yield
        return
    real = dist.reduce_scatter_tensor

    def reduce_scatter_tensor(output: Any, input: Any, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        mean = op == dist.ReduceOp.AVG
        real(output, input, op=dist.ReduceOp.SUM if mean else op, group=group)
        if mean:
            output.div_(dist.get_world_size(group))

    with ExitStack() as stack:
        for name, value in {
            "Stream": Stream,
            "current_stream": lambda *_: Stream(),
            "stream": lambda *_: nullcontext(),
            "device": lambda *_: nullcontext(),
        }.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        for name in ("range_push", "range_pop"):
            stack.enter_context(patch.object(torch.cuda.nvtx, name, lambda *_: None))
        stack.enter_context(patch.object(dist, "reduce_scatter_tensor", reduce_scatter_tensor))
        yield
