"""Run vLLM once, in a process of its own: `python -m dayzero.serving.generate JOB.json ANSWER.json`.

Its memory (and threads, and signal handlers) are gone when transformers takes its turn. JOB: {"model", "dtype",
"trust_remote_code", "prompts": lists of token ids, "max_new_tokens"}. ANSWER: {"vllm": version, "device", "answers":
[{"tokens", "token_logprobs", "prompt_logprobs"}]} or {"error": one line}. Log probabilities are in nats; that of a
prompt's first token does not exist and is left out.
"""

from __future__ import annotations

import sys
from typing import Any

from dayzero.files import read_json, write_json
from dayzero.serving.vllm_settings import GPU_SHARE, KV_CACHE_GIB


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens and log probabilities by vLLM; raises whatever vLLM raises."""
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    # what else holds some of a GPU is no reason to refuse; on a CPU the same setting sizes more than a check
    on_gpu = vllm.platforms.current_platform.device_type == "cuda"
    more: dict[str, Any] = {"gpu_memory_utilization": GPU_SHARE} if on_gpu else {}
    llm = LLM(
        model=job["model"],
        dtype=job["dtype"],
        trust_remote_code=job["trust_remote_code"],
        max_model_len=max(map(len, job["prompts"])) + job["max_new_tokens"] + 1,
        max_num_seqs=len(job["prompts"]),
        enforce_eager=True,  # compiling takes longer than these few prompts
        kv_cache_memory_bytes=KV_CACHE_GIB << 30,
        seed=0,
        **more,
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=job["max_new_tokens"],
        ignore_eos=True,  # as many tokens as possible are compared
        logprobs=0,
        prompt_logprobs=0,
        detokenize=False,
    )
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]], sampling, use_tqdm=False)
    answers = []
    for ids, output in zip(job["prompts"], outputs, strict=True):
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        own: list[Any] = list(completion.logprobs or [])
        prompt: list[Any] = list(output.prompt_logprobs or [])
        answers.append(
            {
                "tokens": tokens,
                "token_logprobs": [p[t].logprob for p, t in zip(own, tokens, strict=True)],
                "prompt_logprobs": [p[t].logprob for p, t in zip(prompt[1:], ids[1:], strict=True)],
            }
        )
    return {"vllm": vllm.__version__, "device": vllm.platforms.current_platform.device_type, "answers": answers}


def main(job_file: str, answer_file: str) -> None:
    """Read the job, write the answer or the error."""
    try:
        answer = generate(read_json(job_file))
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    write_json(answer_file, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
