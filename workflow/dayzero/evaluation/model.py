"""lm-eval's Hugging Face model with exact prompts, only the logits that are needed, and batches that fit the memory.

Loading, tokenizer and chat template are lm-eval's. Its three request types are done here because there
(1) white space at a prompt's end moves into the answer, so that a chat prompt is not the training prompt,
(2) logits of all positions are kept, in the model's dtype, (3) `auto` batch sizes end in the kernel's out-of-memory
killer on a CPU, and (4) an answer that was cut off cannot be told from a finished one.

Shape legend: B batch, T tokens, C tokens of the continuation, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dayzero.console import ProgressBar, log
from dayzero.evaluation.attention import decode_without_copies
from dayzero.memory import available_memory

MAX_BATCH = 64
"""Rows in a batch at most; more gain nothing."""
CPU_SCORING_TOKENS = 4096
"""Tokens in a batch that is only scored, on a CPU: it computes no faster with more, but pads more."""
CPU_ANSWERS = 32
"""Prompts answered together on a CPU: larger batches wait for their longest answer and show no progress."""
MEMORY_SHARE = 0.5
"""Share of the free memory that a batch may take."""

Score = tuple[float, bool]
Tokens = tuple[int, ...]


class ExactLM(HFLM):
    """`directory`: an exported Hugging Face model. `chat`: prompts come from the model's chat template."""

    def __init__(
        self, directory: Path, *, dtype: str, batch_size: int | str, chat: bool, trust_remote_code: bool
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            decode_without_copies()
        # a chat template writes its own BOS, if it wants one
        super().__init__(
            str(directory),
            backend="causal",
            device=device,
            dtype=dtype,
            add_bos_token=False if chat else None,
            trust_remote_code=trust_remote_code,
        )
        self._rows = batch_size
        self._keeps_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self.truncated: dict[str, bool] = {}
        """For each prompt whether the answer was cut off at `max_gen_toks`."""
        self.tasks: list[Any] = []
        """lm-eval's tasks of this run: what they want scored after a prompt is scored when that prompt is answered."""
        self._known: dict[tuple[Tokens, Tokens], Score] = {}

    # -- likelihoods -------------------------------------------------------------------------------------------------

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of prompt and answer, split exactly where the prompt ends."""
        prompt, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        if whole[: len(prompt)] == prompt:
            return prompt, whole[len(prompt) :]
        return prompt, self.tok_encode(continuation, add_special_tokens=False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Score]:
        """(log likelihood in nats, whether greedy decoding gives it) of each (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log likelihood in nats of each whole text, in windows of the model's context length."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            # the prefix token is the BOS; a tokenizer's own would be scored, and predicted, as text
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, override_bs: Any = None
    ) -> list[Score]:
        """Scores of (_, context tokens, continuation tokens); requests with the same input share one forward pass."""
        results: list[Score] = [(0.0, True)] * len(requests)
        inputs: dict[Tokens, list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if known := self._known.get((tuple(context), tuple(continuation))):
                results[index] = known
            elif continuation:  # an empty one has probability 1
                tokens = (context + continuation)[-(self.max_length + 1) :]
                inputs.setdefault(tuple(tokens[:-1]), []).append(index)

        with ProgressBar("scoring", sum(map(len, inputs.values()))) as bar:
            for batch in self._batches(list(inputs), new_tokens=None):
                longest = len(batch[0])
                wanted = {row: max(len(requests[i][2]) for i in inputs[row]) for row in batch}
                keep = max(min(wanted[row], len(row)) + longest - len(row) for row in batch)
                for row, logits in zip(batch, self._logits(batch, keep), strict=True):  # logits [keep, V]
                    end = keep - (longest - len(row))
                    for index in inputs[row]:
                        continuation = requests[index][2][-len(row) :]
                        results[index] = _score(logits[end - len(continuation) : end], continuation)
                bar.advance(sum(len(inputs[row]) for row in batch))
        return results

    def _logits(self, rows: Sequence[Tokens], keep: int) -> torch.Tensor:
        """Logits [B, keep, V] of the last `keep` positions of the rows, padded on the right."""
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        # causal attention: what stands to the right of a row's end cannot change it, so no mask is needed
        batch = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=self.device)
        extra = {"logits_to_keep": keep} if self._keeps_logits else {}
        with torch.inference_mode():
            return self.model(batch, use_cache=False, **extra).logits[:, -keep:]

    # -- generation --------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The answer to each (context, generation arguments), up to a stop sequence, end of turn or `max_gen_toks`."""
        results = [""] * len(requests)
        wanted = self._wanted()
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        with ProgressBar("answering", len(requests)) as bar:
            for group in groups.values():
                arguments = normalize_gen_kwargs(requests[group[0]].args[1], self.max_gen_toks)
                by_prompt: dict[Tokens, list[int]] = {}
                for index in group:
                    tokens = self.tok_encode(requests[index].args[0])
                    room = self.max_length - arguments["max_gen_toks"]
                    if len(tokens) > room:
                        log.warning(
                            "a prompt of %d tokens is cut to its last %d, as the context is full", len(tokens), room
                        )
                    by_prompt.setdefault(tuple(tokens[-room:]), []).append(index)
                for batch in self._batches(list(by_prompt), new_tokens=arguments["max_gen_toks"]):
                    for prompt, (answer, cut) in zip(batch, self._answers(batch, arguments, wanted), strict=True):
                        for index in by_prompt[prompt]:
                            results[index] = answer
                            self.truncated[requests[index].args[0]] = cut
                    bar.advance(sum(len(by_prompt[prompt]) for prompt in batch))
        return results

    def _answers(
        self, rows: Sequence[Tokens], arguments: dict[str, Any], wanted: dict[Tokens, list[Tokens]]
    ) -> Iterator[tuple[str, bool]]:
        """(text, cut off) for each prompt, generated in one batch padded on the left."""
        options = dict(arguments)
        limit, until = options.pop("max_gen_toks"), options.pop("until", None)
        if not options.get("do_sample"):
            options = {"do_sample": False}
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        ends = self._end_tokens()
        batch = torch.tensor([[*[pad] * (longest - len(row)), *row] for row in rows], device=self.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.device)
        stops = handle_stop_sequences(list(until or []), eos=None)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=batch,
                attention_mask=mask,
                max_new_tokens=limit,
                pad_token_id=pad,
                eos_token_id=ends,
                stopping_criteria=stop_sequences_criteria(self.tokenizer, stops, longest, len(rows)),
                return_dict_in_generate=True,
                **options,
            )
            self._score_after_prompts(rows, wanted, getattr(output, "past_key_values", None), mask)
        for tokens in output.sequences[:, longest:].tolist():
            end = next((i for i, token in enumerate(tokens) if token in ends), None)
            text = self.tok_decode(tokens[:end])
            answer = postprocess_generated_text(text, stops, None)
            yield answer, end is None and answer == text and len(tokens) >= limit

    def _wanted(self) -> dict[Tokens, list[Tokens]]:
        """The continuations whose likelihood the run's tasks want, by prompt."""
        wanted: dict[Tokens, list[Tokens]] = {}
        for task in self.tasks:
            for request in task.instances:
                if request.request_type == "loglikelihood" and request.args[0]:
                    prompt, continuation = map(tuple, self._encode_pair(*request.args))
                    if continuation and len(prompt) + len(continuation) <= self.max_length:
                        wanted.setdefault(prompt, []).append(continuation)
        return wanted

    def _score_after_prompts(
        self, rows: Sequence[Tokens], wanted: dict[Tokens, list[Tokens]], cache: Any, mask: torch.Tensor
    ) -> None:
        """Score wanted continuations on the keys and values that answering has left of the prompts.

        Left out (and scored in the ordinary way later) for caches that cannot be cut back to the prompt.
        """
        if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return
        longest = mask.shape[1]
        for turn in range(max(len(wanted.get(row, ())) for row in rows)):
            # rows with nothing (more) to score go along with their last prompt token alone
            scored = [wanted[row][turn] if turn < len(wanted.get(row, ())) else () for row in rows]
            width = max(1, *map(len, scored))
            cache.crop(longest - 1 - cache.get_seq_length())  # negative: so many tokens less
            inputs = [[row[-1], *ids[:-1]] for row, ids in zip(rows, scored, strict=True)]
            batch = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in inputs], device=self.device)
            steps = torch.arange(width, device=self.device)
            logits = self.model(
                batch,
                attention_mask=torch.cat([mask, mask.new_ones(len(rows), width - 1)], dim=1),
                position_ids=mask.sum(dim=1, keepdim=True) - 1 + steps,
                past_key_values=cache,
                use_cache=True,
            ).logits  # [B, C, V]
            for row, ids, own in zip(rows, scored, logits, strict=True):
                if ids:
                    self._known[row, ids] = _score(own[: len(ids)], list(ids))

    def _end_tokens(self) -> list[int]:
        """Token ids that end a turn: the tokenizer's EOS and those of the model's generation config."""
        configured = self.model.generation_config.eos_token_id
        ids = {self.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
        return sorted(i for i in ids if i is not None)

    # -- batches -----------------------------------------------------------------------------------------------------

    def _batches(self, rows: list[Tokens], new_tokens: int | None) -> Iterator[list[Tokens]]:
        """Rows sorted by length (little padding, the largest batch first) and cut into batches.

        `new_tokens`: tokens to be generated for each row; None when rows are only scored.
        """
        rows = sorted(rows, key=lambda row: (-len(row), row))
        free = available_memory(self.device) * MEMORY_SHARE
        while rows:
            if isinstance(self._rows, int):
                size = self._rows
            else:
                size = max(1, min(MAX_BATCH, int(free // self._row_bytes(len(rows[0]), new_tokens))))
                if self.device.type == "cpu":
                    most = CPU_ANSWERS if new_tokens else max(1, CPU_SCORING_TOKENS // max(1, len(rows[0])))
                    size = min(size, most)
            yield rows[:size]
            rows = rows[size:]

    def _row_bytes(self, length: int, new_tokens: int | None) -> int:
        """A generous estimate of the memory that one row of `length` tokens takes."""
        config = self.model.config.get_text_config()
        width = getattr(config, "hidden_size", 1024)
        hidden = getattr(config, "intermediate_size", None) or 4 * width
        item = self.model.dtype.itemsize
        activations = length * (16 * width + 4 * hidden) * item
        if self.device.type == "cuda" and self.model.dtype == torch.float32:
            # of grouped queries in float32 only torch's plain kernel attends, which holds all scores
            activations += 4 * getattr(config, "num_attention_heads", 32) * length * length * item
        if new_tokens is None:
            return activations + length * config.vocab_size * (item + 4)
        cache = (length + new_tokens) * 4 * width * getattr(config, "num_hidden_layers", 32) * item
        return activations + cache + (new_tokens * item + 32) * config.vocab_size


def _score(logits: torch.Tensor, continuation: list[int]) -> Score:
    """Log likelihood of the continuation [C] under logits [C, V], in float32, and whether it is the greedy choice."""
    target = torch.tensor(continuation, device=logits.device)
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    total = log_probs.gather(1, target[:, None]).sum().item()
    return total, bool((logits.argmax(-1) == target).all())
