"""Which of its kernels torch's scaled dot product attention takes on a GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

CUDNN_MULTIPLE = 128
"""Row lengths that cuDNN's attention is used for. It prepares itself for each new one, which takes longer than it gains
where rows are padded to ever different lengths."""

CUDNN_WIDEST = 128
"""Head width that cuDNN's attention takes on every GPU that it runs on."""


def sdpa_order(device: torch.device, tokens: int, *, by_documents: bool) -> AbstractContextManager[None]:
    """While active, the order in which SDPA asks its kernels on a GPU: the forward and the backward pass both need it,
    for what is computed again must come from the same kernel.

    cuDNN first for rows of `tokens`, with grouped queries almost twice as fast as FlashAttention 2
    (docs/performance-notes.md), unless its documents, each of another length, are attended to `by_documents`. Left
    out otherwise: whether torch would ask it first depends on torch's version and on what was called before.
    """
    if device.type != "cuda":
        return nullcontext()
    cudnn_first = tokens % CUDNN_MULTIPLE == 0 and not by_documents
    return sdpa_kernel(ORDER if cudnn_first else ORDER[1:], set_priority=True)


def takes_groups_under_a_mask(query: Tensor) -> bool:
    """Whether SDPA has another kernel than its plain one, which holds all scores, for grouped queries and a mask.

    On a GPU that is cuDNN's alone, where `sdpa_order` lets it; transformers repeats keys and values for the same reason
    (its `use_gqa_in_sdpa`).
    """
    if not query.is_cuda:
        return True
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and query.shape[-1] <= CUDNN_WIDEST and torch.backends.cuda.cudnn_sdp_enabled()
