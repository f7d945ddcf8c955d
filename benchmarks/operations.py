"""Single operations of a training step on one CUDA GPU: products, attention, losses, casts to 8 bits.

    python benchmarks/operations.py [--repeat 6]
    python benchmarks/operations.py --self-check       # tiny shapes, on a CPU too

The shapes are Llama-3.1-8B's with 2 rows of 4096 tokens: random data in bfloat16, CUDA events, medians over the
repetitions behind two that are not counted. Forward and backward pass together unless said. What cannot run says why.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "workflow")]

import torch
from dayzero.engine.document_attention import forget_documents, varlen_attention, varlen_attn
from dayzero.engine.document_attention import mask as separate_documents
from dayzero.engine.float8 import WEIGHT, factors_forward, product, to_float8
from dayzero.engine.loss import CausalLMWithLoss, LossOptions, decoder_returns
from dayzero.engine.loss_choice import LOSSES
from dayzero.engine.structure import find_decoder
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_outputs import BaseModelOutputWithPast


@dataclass(frozen=True)
class Shapes:
    """Of the operations that are timed."""

    rows: int = 2
    tokens: int = 4096
    documents: int = 8
    """In each row, where rows are packed."""
    heads: int = 32
    groups: int = 8
    width: int = 128
    hidden: int = 4096
    narrow: int = 2048
    """Hidden size of the model whose head is trained."""
    inner: int = 14336
    vocabulary: int = 128256
    copied: int = 2**30
    """Bytes."""


TINY = Shapes(2, 64, 4, 4, 2, 16, 64, 32, 128, 512, 2**16)

Operation = tuple[str, Callable[[], object], float]
"""What it is, a call that does it once, and its operations or moved bytes (0: not counted)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=6, help="timed calls of each operation")
    parser.add_argument("--self-check", action="store_true", help="tiny shapes, a CPU will do")
    args = parser.parse_args()
    if not (args.self_check or torch.cuda.is_available()):
        raise SystemExit("operations.py needs a CUDA GPU; --self-check runs its code on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = TINY if args.self_check else Shapes()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    print(f"{name}, torch {torch.__version__}\n\n| operation | ms | T/s |\n|---|---:|---:|", flush=True)
    for part in (products, casts, attention, losses):
        for what, call, work in part(shapes, device):
            try:
                seconds = timed(call, args.repeat, device)
            except Exception as error:  # a kernel's own reason must not end the others
                why = (str(error).strip().splitlines() or [type(error).__name__])[0]
                print(f"| {what} | not here: {why[:120]} | |", flush=True)
                continue
            rate = f"{work / seconds / 1e12:.3g}" if work else ""
            print(f"| {what} | {1000 * seconds:.3f} | {rate} |", flush=True)


def timed(call: Callable[[], object], repeat: int, device: torch.device) -> float:
    """Seconds of one call: the median of `repeat`."""
    taken = []
    for number in range(repeat + 2):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1000
        else:
            started = time.perf_counter()
            call()
            seconds = time.perf_counter() - started
        taken += [seconds] if number >= 2 else []
    return median(taken)


def products(s: Shapes, device: torch.device) -> Iterator[Operation]:
    """A copy, and products of [rows x tokens, hidden] by [hidden, inner]."""
    source = torch.zeros(s.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    yield "a copy (read and written)", lambda: target.copy_(source), 2 * s.copied
    x = torch.randn(s.rows * s.tokens, s.hidden, device=device).bfloat16()
    weight = torch.randn(s.inner, s.hidden, device=device).bfloat16()
    work = 2.0 * x.numel() * s.inner
    yield "a product in bfloat16, forward", lambda: x @ weight.t(), work
    for by_row in (False, True):
        codes = *to_float8(x, WEIGHT, by_row=by_row), *to_float8(weight, WEIGHT, by_row=by_row)
        factors = factors_forward(*codes)
        for fast in (True, False):
            scales = "one scale a row" if by_row else "one scale"
            what = f"the same in 8 bits, {scales}, {'fast' if fast else 'exact'} accumulation"

            def multiply(factors: tuple[Tensor, ...] = factors, fast: bool = fast) -> Tensor:
                return product(*factors, torch.bfloat16, device.type == "cpu", fast=fast)  # type: ignore[arg-type]

            yield what, multiply, work


def casts(s: Shapes, device: torch.device) -> Iterator[Operation]:
    """What 8-bit products need besides."""
    codes, _ = to_float8(torch.randn(s.inner, s.hidden, device=device), WEIGHT, by_row=False)
    yield "a weight [inner, hidden] in 8 bits turned", lambda: codes.t().contiguous(), 0
    x = torch.randn(s.rows * s.tokens, s.hidden, device=device).bfloat16()
    yield "[tokens, hidden] cast to 8 bits", lambda: to_float8(x, WEIGHT, by_row=False), 0
    compiled = torch.compile(to_float8)
    yield "the same, compiled", lambda: compiled(x, WEIGHT, by_row=False), 0


def attention(s: Shapes, device: torch.device) -> Iterator[Operation]:
    """Grouped queries over whole rows, and over rows of several documents."""
    q = torch.randn(s.rows, s.heads, s.tokens, s.width, device=device).bfloat16().requires_grad_()
    k, v = (
        torch.randn(s.rows, s.groups, s.tokens, s.width, device=device).bfloat16().requires_grad_() for _ in range(2)
    )
    each = s.tokens // s.documents
    of = torch.arange(s.tokens, device=device) // each
    mask = (of[:, None] == of[None, :]).tril()[None, None].expand(s.rows, 1, -1, -1)

    def sdpa(kernel: SDPBackend | None, **options: object) -> Callable[[], object]:
        def call() -> None:
            with sdpa_kernel(kernel) if kernel and device.type == "cuda" else nullcontext():
                output = scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)  # type: ignore[arg-type]
                torch.autograd.grad(output.sum(), (q, k, v))

        return call

    def repeated() -> None:  # the memory-efficient kernel knows no groups
        keys, values = (x.repeat_interleave(s.heads // s.groups, dim=1) for x in (k, v))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if device.type == "cuda" else nullcontext():
            torch.autograd.grad(scaled_dot_product_attention(q, keys, values, mask).sum(), (q, k, v))

    def varlen() -> None:
        if varlen_attn is None:
            raise ImportError("this torch has no varlen attention")
        output, _ = varlen_attention(nn.Module(), q, k, v, None)
        torch.autograd.grad(output.sum(), (q, k, v))

    forget_documents()
    separate_documents(s.rows, s.tokens, s.tokens, mask_function=partial(_same_document, each), device=device)
    yield "attention to whole rows, FlashAttention 2", sdpa(SDPBackend.FLASH_ATTENTION, is_causal=True), 0
    yield "the same by cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION, is_causal=True), 0
    yield f"{s.documents} documents a row: a mask, memory-efficient kernel", repeated, 0
    yield "the same: a mask, cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION, attn_mask=mask), 0
    yield "the same: varlen", varlen, 0


def _same_document(each: int, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query // each == key // each) & (key <= query)


def losses(s: Shapes, device: torch.device) -> Iterator[Operation]:
    """The losses over all positions of the rows, on a frozen head and on a narrower trained one."""
    for hidden_size, trained in ((s.hidden, False), (s.narrow, True)):
        config = LlamaConfig(
            vocab_size=s.vocabulary, hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=s.heads, tie_word_embeddings=False,
        )  # fmt: skip
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
        model.get_output_embeddings().requires_grad_(trained)
        hidden = torch.randn(s.rows, s.tokens, hidden_size, device=device).bfloat16().requires_grad_()
        labels = torch.randint(0, s.vocabulary, (s.rows, s.tokens), device=device)
        positions = torch.arange(s.tokens, device=device).expand(s.rows, -1)
        head = f"{'trained' if trained else 'frozen'} head [{s.vocabulary}, {hidden_size}]"
        for name, chunk in (("chunked", 1024), ("chunked", 4096), ("cut_cross_entropy", 1024), ("liger_fused", 1024)):
            module = CausalLMWithLoss(model, loss=LOSSES[name], options=LossOptions(chunk_size=chunk))
            what = f"{name} by {chunk}" if name == "chunked" else name
            yield f"{what}, {head}", partial(_loss_behind, module, hidden, labels, positions), 0


def _loss_behind(module: CausalLMWithLoss, hidden: Tensor, labels: Tensor, positions: Tensor) -> None:
    """Both passes of a loss whose decoder returned `hidden` [B, T, D]."""
    hidden.grad = module.model.get_output_embeddings().weight.grad = None
    with decoder_returns(find_decoder(module.model), BaseModelOutputWithPast(last_hidden_state=hidden)):
        module(labels, labels, positions).backward()


if __name__ == "__main__":
    main()
