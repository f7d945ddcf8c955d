"""Attention for packed rows: each document by itself, so that nothing is computed only to be masked away.

transformers separates the documents of a row by a mask [B, 1, T, T]. Here its place is taken by the documents' lengths,
read off the same mask function, and attention runs on one document after the other (documents) or on all at once by
a kernel for rows of many lengths (varlen, CUDA). A mask that says more than "the same document and not later" is made
whole, and attended under, as transformers would.

Shapes: B rows, T tokens, H query heads, K key and value heads, E head width, N = B T tokens.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, masking_utils
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

varlen_attn: Callable[..., Any] | None = None
with suppress(ImportError):  # not every build of torch has it
    from torch.nn.attention.varlen import varlen_attn

DOCUMENTS = "dayzero_documents"
VARLEN = "dayzero_varlen"

WIDEST = 256
"""Head width that the kernel for rows of many lengths takes, in multiples of 8."""

_TAKES = frozenset(() if varlen_attn is None else inspect.signature(varlen_attn).parameters)
_CAUSAL: dict[str, Any] = {"window_size": (-1, 0)}  # to the left without end, nothing to the right
if "window_size" not in _TAKES:  # an older torch
    _CAUSAL = {"is_causal": True}


@dataclass(frozen=True)
class _Documents:
    shape: tuple[int, int]
    """B and T."""
    lengths: list[list[int]]
    """Of the documents of each row; a row's add up to T."""
    whole_rows: bool
    """Whether every row is one document."""
    bounds: Tensor
    """int32 [documents + 1]: where each begins in the rows end to end, on the attention's device."""
    longest: int


_documents: _Documents | None = None


def forget_documents() -> None:
    """Before a forward pass: what the last one's masks said is over."""
    global _documents
    _documents = None


def recalled() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For activation checkpointing (its `context_fn`): what is computed again sees the documents of the first time,
    also where another model has been called since, as in distillation."""
    return nullcontext(), _as_before(_documents)


@contextmanager
def _as_before(documents: _Documents | None) -> Iterator[None]:
    global _documents
    present, _documents = _documents, documents
    try:
        yield
    finally:
        _documents = present


def may_be_packed(position_ids: Tensor) -> bool:
    """Whether rows [B, T] hold several documents; said of all that lie on a GPU, of which to ask is to wait."""
    return position_ids.is_cuda or bool((position_ids.diff(dim=1) != 1).any())


def look_for_documents(position_ids: Tensor) -> AbstractContextManager[None]:
    """While active, transformers takes from rows [B, T] on the CPU whether they are packed. If not, it would
    look on the device, which waits for all that was asked of it before: 5 ms of each 550 (docs/performance-notes.md).
    """
    own = getattr(masking_utils, "find_packed_sequence_indices", None)
    return nullcontext() if own is None or may_be_packed(position_ids) else _finding_none()


@contextmanager
def _finding_none() -> Iterator[None]:
    own = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = own


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """transformers' mask signature: None where the documents say it all, else a mask [B, 1, T, T].

    `local_size`: tokens that a sliding window or a chunk has.
    """
    global _documents
    assert mask_function is not None
    if attention_mask is None and not use_vmap and q_length == kv_length and q_offset == kv_offset == 0:
        found = _documents_of(mask_function, batch_size, q_length, torch.device(device))
        fits = found is not None and (local_size is None or found.longest <= local_size)
        # layers that are masked in different ways: the first keep their documents, the others get a mask
        if fits and (_documents is None or _documents.lengths == found.lengths):  # type: ignore[union-attr]
            _documents = found
            return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        device=device,
        **{**options, "allow_is_causal_skip": False},
    )


def _documents_of(visible: Callable[..., Tensor], rows: int, tokens: int, device: torch.device) -> _Documents | None:
    """The documents that `visible(row, head, query, key)` keeps apart; None where it says something else too.

    A document begins where a token does not see the one before it.
    """
    shape = rows, tokens
    if visible is masking_utils.causal_mask_function:  # said without asking the device
        bounds = torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=device)
        return _Documents(shape, [[tokens]] * rows, True, bounds, tokens)
    row, head = torch.arange(rows, device=device)[:, None], torch.zeros(1, 1, dtype=torch.long, device=device)
    token = torch.arange(tokens, device=device)[None, :]
    before = visible(row, head, token, (token - 1).clamp(min=0)).expand(shape)
    if not visible(row, head, token, token).expand(shape).all():
        return None
    if tokens > 1 and visible(row, head, token[:, :-1], token[:, 1:]).any():  # some see what is to come
        return None
    begins = ~before
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    bounds = torch.cat([starts, starts.new_tensor([rows * tokens])])
    flat = bounds.diff().tolist()
    counts = begins.sum(dim=1).tolist()
    lengths = [flat[sum(counts[:r]) : sum(counts[: r + 1])] for r in range(rows)]
    return _Documents(shape, lengths, max(counts) == 1, bounds.int(), max(flat))


def documents_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [B, H, T, E], key and value [B, K, T, E] -> [B, T, H, E].

    Every document goes through transformers' own SDPA attention, which knows the model's options.
    """
    found = _fitting(query, key, attention_mask, options)
    if found is None or found.whole_rows:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows = []
    for row, lengths in enumerate(found.lengths):
        # split, not sliced: the gradient of n slices would be n tensors of the whole row's size
        parts = [x[row : row + 1].split(lengths, dim=2) for x in (query, key, value)]
        done = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in zip(*parts, strict=True)]
        rows.append(torch.cat(done, dim=1))
    return torch.cat(rows), None


def varlen_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As `documents_attention`, all documents in one call of torch's kernel for rows of many lengths (CUDA).

    A compiler may trace it: nothing here depends on how many documents there are.
    """
    found = _fitting(query, key, attention_mask, options)
    if found is None or found.whole_rows:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    width = query.shape[-1]
    if options.get("dropout") or width != value.shape[-1] or width % 8 or width > WIDEST:
        return documents_attention(module, query, key, value, attention_mask, **options)
    repeats, more = query.shape[1] // key.shape[1], dict(_CAUSAL)
    if "enable_gqa" in _TAKES:
        more["enable_gqa"] = repeats > 1
    else:
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    if torch.is_autocast_enabled(query.device.type):  # which does not know the kernel
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [N, H, E]
    size, bounds = found.longest, found.bounds
    assert varlen_attn is not None
    output = varlen_attn(q, k, v, bounds, bounds, size, size, scale=options.get("scaling"), **more)
    assert isinstance(output, Tensor)
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


def _fitting(query: Tensor, key: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> _Documents | None:
    """The documents of the present rows; None where a mask says who sees whom, or none does.

    None too where attention cannot be cut into documents (its keys are not the row's tokens, or a bias by position is
    added): such a model's documents see one another, which is found out before training (see `packing.py`).
    """
    if attention_mask is not None or _documents is None or options.get("position_bias") is not None:
        return None
    shape = _documents.shape
    same = (query.shape[0], query.shape[2]) == shape and (key.shape[0], key.shape[2]) == shape
    return _documents if same else None


def makes_its_own_mask(model: nn.Module) -> bool:
    """Whether the code of `model` asks for a mask in any case, to add something of its own to it (ALiBi, say).

    transformers makes none where plain causal attention will do, but for those who pass `allow_is_causal_skip=False`.
    Which of the two a packed row's mask is asked for by cannot be seen when it is; so the code is read.
    """
    places = {type(module).__module__ for module in model.modules()}
    return any("allow_is_causal_skip=False" in _code(p) for p in places if not p.startswith(("torch.", "peft.")))


def _code(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except OSError:  # typed in, not read from a file
        return ""


def has_varlen() -> bool:
    """Whether this torch has the kernel, and this machine a GPU to run it on."""
    return varlen_attn is not None and torch.cuda.is_available()


for _name, _attention in ((DOCUMENTS, documents_attention), (VARLEN, varlen_attention)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, mask)
