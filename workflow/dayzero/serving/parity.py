"""Does vLLM say what transformers says? Greedy tokens and prompt log probabilities of both on the same prompts.

vLLM decodes greedily; transformers then reads prompt and answer in one pass and must agree with every token, given the
ones before it. That is the same as comparing two greedy decodings, goes on behind a first difference, and shows by how
much the two candidates differ there: less than the tolerance is a near tie, which rounding decides.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dayzero.config import Serving
from dayzero.console import log, track
from dayzero.errors import ConfigError, DataError
from dayzero.files import read_json, write_json
from dayzero.serving.vllm_settings import environment, require_model, require_vllm

UNSUPERVISED_PROMPT = 32
"""Tokens taken as the prompt of a document whose labels begin at once (plain text)."""


def choose_prompts(tokens: Path, num_prompts: int, max_tokens: int) -> list[list[int]]:
    """Prompts as token ids from the token store: validation rows, or training rows where there are none.

    Of documents spread evenly over the split, the part before the first supervised token (else the first 32 tokens),
    cut to its last `max_tokens`. Raises DataError for a store without documents.
    """
    split = next(
        (tokens / name for name in ("validation", "train") if (tokens / name / "input_ids.npy").is_file()), None
    )
    if split is None:
        raise DataError(f"{tokens} holds neither validation/ nor train/ tokens: run the tokenize stage first")
    ids = np.load(split / "input_ids.npy", mmap_mode="r")
    mask = np.load(split / "loss_mask.npy", mmap_mode="r")
    offsets = np.load(split / "document_offsets.npy")
    documents = len(offsets) - 1
    if documents < 1 or len(ids) == 0:
        raise DataError(f"{split} holds no documents: check the data and tokenize.min_label_tokens")
    prompts = []
    for document in np.unique(np.linspace(0, documents - 1, num_prompts).astype(int)):
        begin, end = offsets[document], offsets[document + 1]
        supervised = np.flatnonzero(mask[begin:end])
        # a text's labels begin at its second token, which leaves no prompt worth the name
        length = supervised[0] if len(supervised) and supervised[0] > 1 else min(end - begin, UNSUPERVISED_PROMPT)
        prompts.append([int(i) for i in ids[begin : begin + length][-max_tokens:]])
    return prompts


def compare(config: Serving, model: Path, tokens: Path, trust_remote_code: bool) -> dict[str, Any]:
    """Run both engines on the exported `model`; what parity.json holds, without provenance.

    Raises ConfigError where vLLM is missing or cannot serve the model, naming its reason, or code of the model's own
    may not be run.
    """
    from dayzero.pretrained import context_length, load_config

    require_vllm()
    require_model(model)
    longest, context = config.max_prompt_tokens, context_length(load_config(model, trust_remote_code))
    if context is not None:
        longest = min(longest, context - config.max_new_tokens - 1)
    if longest < 2 <= config.max_prompt_tokens:
        raise ConfigError(
            f"serving.max_new_tokens = {config.max_new_tokens} leaves no room for a prompt in the model's context "
            f"of {context} tokens: lower it"
        )
    prompts = choose_prompts(tokens, config.num_prompts, longest)
    log.info("vLLM answers %d prompts of up to %d tokens (loading takes a while)", len(prompts), max(map(len, prompts)))
    served = run_vllm(model, prompts, config, trust_remote_code)
    answers = [answer["tokens"] for answer in served["answers"]]
    reference = _transformers(model, prompts, answers, config.dtype, trust_remote_code)
    return {**judge(prompts, served["answers"], reference, config.tolerance), **_versions(config, served)}


def run_vllm(model: Path, prompts: list[list[int]], config: Serving, trust_remote_code: bool) -> dict[str, Any]:
    """What `generate.py` answers; ConfigError with vLLM's own reason when it fails."""
    job = {
        "model": str(model.resolve()),
        "dtype": config.dtype,
        "prompts": prompts,
        "max_new_tokens": config.max_new_tokens,
        "trust_remote_code": trust_remote_code,
    }
    with tempfile.TemporaryDirectory(prefix="dayzero-vllm-") as folder:
        job_file, answer_file = Path(folder) / "job.json", Path(folder) / "answer.json"
        job_file.write_text(json.dumps(job))
        command = [sys.executable, "-m", "dayzero.serving.generate", str(job_file), str(answer_file)]
        done = subprocess.run(command, env=environment(own_process=True), capture_output=True, text=True, check=False)
        answer = read_json(answer_file) if answer_file.is_file() else {"error": f"it ended with code {done.returncode}"}
    if "error" not in answer:
        return answer
    for line in (done.stdout + done.stderr).splitlines()[-40:]:
        log.info("vLLM: %s", line)
    lacks = re.search(r"head[ _](size|dim)", answer["error"], re.IGNORECASE)
    hint = " (a head size that vLLM's attention lacks: serve with another engine)" if lacks else ""
    raise ConfigError(f"vLLM cannot serve {model}: {answer['error'][:500]}{hint}")


def judge(
    prompts: list[list[int]], served: list[dict[str, Any]], reference: list[dict[str, Any]], tolerance: float
) -> dict[str, Any]:
    """The verdict and what it rests on, prompt by prompt.

    `served`: tokens, token_logprobs, prompt_logprobs by vLLM. `reference`: the same logprobs by transformers, and for
    each answer position its own choice (`best`) and that choice's logprob (`best_logprobs`).
    """
    records = []
    for prompt, ours, theirs in zip(prompts, served, reference, strict=True):
        gaps = [best - chosen for best, chosen in zip(theirs["best_logprobs"], theirs["token_logprobs"], strict=True)]
        different = [i for i, best in enumerate(theirs["best"]) if best != ours["tokens"][i]]
        near = [i for i in different if gaps[i] < tolerance]
        records.append(
            {
                "prompt_tokens": len(prompt),
                "tokens": ours["tokens"],
                "mismatches": [
                    {"position": i, "vllm": ours["tokens"][i], "transformers": theirs["best"][i], "gap": gaps[i]}
                    for i in different
                    if i not in near
                ],
                "near_ties": [{"position": i, "transformers": theirs["best"][i], "gap": gaps[i]} for i in near],
                "max_logprob_difference": _largest(ours["prompt_logprobs"], theirs["prompt_logprobs"]),
                "max_token_logprob_difference": _largest(ours["token_logprobs"], theirs["token_logprobs"]),
            }
        )
    mismatches = sum(len(r["mismatches"]) for r in records)
    largest = max(r["max_logprob_difference"] for r in records)
    return {
        "verdict": "pass" if mismatches == 0 and largest <= tolerance else "fail",
        "num_prompts": len(prompts),
        "tokens_compared": sum(len(r["tokens"]) for r in records),
        "token_mismatches": mismatches,
        "near_ties": sum(len(r["near_ties"]) for r in records),
        "max_logprob_difference": largest,
        "max_token_logprob_difference": max(r["max_token_logprob_difference"] for r in records),
        "tolerance": tolerance,
        "prompts": records,
    }


def write_verdict(path: Path, result: dict[str, Any]) -> None:
    """Write parity.json for a pass. For a fail write parity.failed.json beside it instead, and raise DataError."""
    failed = path.with_suffix(".failed.json")
    if result["verdict"] == "pass":
        write_json(path, result)
        failed.unlink(missing_ok=True)
        return
    path.unlink(missing_ok=True)
    write_json(failed, result)
    raise DataError(
        f"vLLM and transformers disagree: {result['token_mismatches']} of {result['tokens_compared']} greedy tokens "
        f"differ, prompt log probabilities by up to {result['max_logprob_difference']:.3g} (serving.tolerance = "
        f"{result['tolerance']:g}, serving.dtype = {result['dtype']}); see {failed}"
    )


def _transformers(
    model: Path, prompts: list[list[int]], answers: list[list[int]], dtype: str, trust_remote_code: bool
) -> list[dict[str, Any]]:
    """Log probabilities of prompt and answer tokens by transformers, and its own greedy choices."""
    import torch

    from dayzero.pretrained import load_causal_lm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network: Any = load_causal_lm(model, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code)
    network = network.to(device).eval()
    results = []
    for prompt, answer in track(list(zip(prompts, answers, strict=True)), "transformers reads"):
        ids = torch.tensor([prompt + answer], device=device)
        with torch.inference_mode():
            logits = network(ids, use_cache=False).logits[0, :-1]
        log_probs = torch.log_softmax(logits.float(), dim=-1)  # [T - 1, V]
        chosen = log_probs.gather(1, ids[0, 1:, None])[:, 0].tolist()
        best_logprobs, best = log_probs[len(prompt) - 1 :].max(dim=-1)
        results.append(
            {
                "prompt_logprobs": chosen[: len(prompt) - 1],
                "token_logprobs": chosen[len(prompt) - 1 :],
                "best": best.tolist(),
                "best_logprobs": best_logprobs.tolist(),
            }
        )
    return results


def _largest(a: list[float], b: list[float]) -> float:
    """Largest absolute difference; DataError when a value is not a number, which no tolerance can judge."""
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    if not all(map(math.isfinite, differences)):
        raise DataError("a log probability is not finite: the model's weights overflow in serving.dtype, use float32")
    return max(differences, default=0.0)


def _versions(config: Serving, served: dict[str, Any]) -> dict[str, Any]:
    import transformers

    return {
        "dtype": config.dtype,
        "device": served["device"],
        "vllm": served["vllm"],
        "transformers": transformers.__version__,
    }
