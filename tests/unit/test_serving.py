"""vLLM against transformers: the verdict, the prompts, refusals, and the server. tests/workflow has real verdicts."""

import copy
import json
import os
import signal
import socket
import subprocess
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
from dayzero.config import Serving
from dayzero.errors import ConfigError, DataError
from dayzero.pretrained import context_length
from dayzero.serving import server, vllm_settings
from dayzero.serving.parity import choose_prompts, compare, judge, write_verdict
from dayzero.stages import serve, verify_serving
from transformers import BloomConfig, Gemma3Config, GPT2Config, MambaConfig, MptConfig, XLNetConfig

from tests.exported import tiny_export
from tests.terminal import heeding_signals
from tests.token_store import write_token_store

PROMPTS = [[5, 6, 7], [8, 9]]
SERVED = [
    {"tokens": [1, 2], "token_logprobs": [-0.1, -0.2], "prompt_logprobs": [-1.0, -2.0]},
    {"tokens": [3, 4], "token_logprobs": [-0.3, -0.4], "prompt_logprobs": [-3.0]},
]
REFERENCE = [
    {
        "best": answer["tokens"],
        "best_logprobs": answer["token_logprobs"],
        "token_logprobs": answer["token_logprobs"],
        "prompt_logprobs": answer["prompt_logprobs"],
    }
    for answer in SERVED
]


def judged(tolerance=1e-3, **changes):
    """The verdict when transformers' second prompt differs in the given fields."""
    reference = copy.deepcopy(REFERENCE)
    reference[1].update(changes)
    return judge(PROMPTS, SERVED, reference, tolerance)


def test_equal_tokens_and_logprobs_pass():
    result = judged()
    assert (result["verdict"], result["tokens_compared"], result["token_mismatches"]) == ("pass", 4, 0)
    assert result["max_logprob_difference"] == 0


def test_prompt_logprobs_are_held_against_the_tolerance():
    assert judged(prompt_logprobs=[-3.0009])["verdict"] == "pass"
    far = judged(prompt_logprobs=[-3.002])
    assert far["verdict"] == "fail"
    assert far["max_logprob_difference"] == pytest.approx(0.002)


def test_another_token_fails_unless_the_two_are_nearly_tied():
    near = judged(best=[3, 99], best_logprobs=[-0.3, -0.3996])
    assert (near["verdict"], near["near_ties"], near["token_mismatches"]) == ("pass", 1, 0)
    assert near["prompts"][1]["near_ties"] == [{"position": 1, "transformers": 99, "gap": pytest.approx(0.0004)}]
    far = judged(best=[3, 99], best_logprobs=[-0.3, -0.35])
    assert (far["verdict"], far["near_ties"], far["token_mismatches"]) == ("fail", 0, 1)
    assert far["prompts"][1]["mismatches"][0]["vllm"] == 4


def test_a_logprob_that_is_no_number_is_an_error():
    with pytest.raises(DataError, match="not finite"):
        judged(prompt_logprobs=[float("nan")])


def test_a_failed_verdict_leaves_no_parity_file(tmp_path):
    path = tmp_path / "serve" / "parity.json"
    write_verdict(path, {**judged(), "dtype": "float32"})
    assert json.loads(path.read_text())["verdict"] == "pass"
    with pytest.raises(DataError, match=r"1 of 4 greedy tokens differ.*parity\.failed\.json"):
        write_verdict(path, {**judged(best=[3, 99], best_logprobs=[-0.3, -0.35]), "dtype": "float32"})
    assert not path.exists()
    assert json.loads(path.with_suffix(".failed.json").read_text())["verdict"] == "fail"
    write_verdict(path, {**judged(), "dtype": "float32"})
    assert [p.name for p in path.parent.iterdir()] == ["parity.json"]


def store(path, documents):
    write_token_store(path, documents, [[d] for d in range(len(documents))])
    return path.parent


def test_prompts_end_where_supervision_begins(tmp_path):
    chat = [([10 + d, 11, 12, 13, 14], [False, False, False, True, True]) for d in range(9)]
    tokens = store(tmp_path / "train", chat)
    assert choose_prompts(tokens, 3, 256) == [[10, 11, 12], [14, 11, 12], [18, 11, 12]]
    assert choose_prompts(tokens, 1, 2) == [[11, 12]]
    assert len(choose_prompts(tokens, 50, 256)) == 9

    text = list(range(100))
    store(tmp_path / "validation", [(text, [True] * 100), (text[:7], [True] * 7)])  # preferred, where there is one
    assert choose_prompts(tokens, 2, 256) == [text[:32], text[:7]]


def test_a_store_without_tokens_is_refused(tmp_path):
    with pytest.raises(DataError, match="run the tokenize stage first"):
        choose_prompts(tmp_path, 4, 256)
    folder = tmp_path / "train"
    folder.mkdir()
    for name, value in {"input_ids": np.zeros(0, np.int32), "loss_mask": np.zeros(0, bool)}.items():
        np.save(folder / f"{name}.npy", value)
    np.save(folder / "document_offsets.npy", np.zeros(1, np.int64))
    with pytest.raises(DataError, match="holds no documents"):
        choose_prompts(tmp_path, 4, 256)


def test_serving_refuses_a_missing_model_and_a_taken_port(tmp_path, capfd):
    assert serve.main(["--model", str(tmp_path)]) == 1
    assert "run the export stage first" in capfd.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve.main(["--model", str(tmp_path), "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capfd.readouterr().err


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_port_that_is_taken_while_a_gpu_is_waited_for(tmp_path, monkeypatch, capfd):
    """Another server's answer would be taken for ours."""
    BloomConfig().save_pretrained(tmp_path)
    port = free_port()

    @contextmanager
    def own_gpus(_):
        with socket.create_server(("127.0.0.1", port)):
            yield []

    monkeypatch.setattr(server, "own_gpus", own_gpus)
    monkeypatch.setattr(server, "_run", lambda *_: pytest.fail("it cannot listen there"))
    assert serve.main(["--model", str(tmp_path), "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capfd.readouterr().err


def test_too_many_new_tokens_for_the_context_is_refused(tmp_path):
    model = tiny_export(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"serving.max_new_tokens = 511 leaves no room"):
        compare(Serving(max_new_tokens=511), model, tmp_path, trust_remote_code=False)


@pytest.mark.parametrize(
    ("config", "context", "length"),
    [
        (MptConfig(max_seq_len=512), 512, 512),
        (BloomConfig(seq_length=4096), 4096, 4096),
        (GPT2Config(n_positions=77), 77, 77),
        (Gemma3Config(), 131072, 4096),
        (MambaConfig(), None, 4096),
        (XLNetConfig(), None, 4096),  # it says -1
    ],
)
def test_the_server_s_context_is_the_model_s(tmp_path, monkeypatch, config, context, length):
    started = []

    def start(command, **_):
        started.append(command)
        raise OSError("not now")

    monkeypatch.setattr("dayzero.serving.server.subprocess.Popen", start)
    monkeypatch.setattr("dayzero.serving.server._require_free", lambda *_: None)
    config.save_pretrained(tmp_path)
    assert context_length(config) == context
    assert serve.main(["--model", str(tmp_path)]) == 1
    (command,) = started
    assert command[command.index("--max-model-len") + 1] == str(length)


def test_a_model_without_a_context_length_takes_any_prompt(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("dayzero.serving.parity.choose_prompts", lambda *given: asked.append(given) or [[1]])
    monkeypatch.setattr("dayzero.serving.parity.run_vllm", lambda *_: {"answers": []})
    monkeypatch.setattr("dayzero.serving.parity._transformers", lambda *_: [])
    monkeypatch.setattr("dayzero.serving.parity.judge", lambda *_: {})
    monkeypatch.setattr("dayzero.serving.parity._versions", lambda *_: {})
    MambaConfig().save_pretrained(tmp_path)
    compare(Serving(max_prompt_tokens=5000), tmp_path, tmp_path, trust_remote_code=False)
    assert asked == [(tmp_path, 4, 5000)]


@pytest.mark.end_to_end
def test_a_head_size_vllm_lacks_is_one_line(tmp_path):
    model = tiny_export(tmp_path / "run" / "model", head_dim=24)
    tokens = store(tmp_path / "tokens" / "train", [(list(range(3, 30)), [t >= 9 for t in range(27)])])
    out, log = tmp_path / "serve", tmp_path / "log"
    arguments = ["--model", str(model), "--tokens", str(tokens), "--output", str(out), "--log", str(log)]
    assert verify_serving.main(["--config", "{}", *arguments]) == 1
    line = next(text for text in reversed(log.read_text().splitlines()) if "error:" in text)
    assert "vLLM cannot serve" in line
    assert "head size" in line
    assert not (out / "parity.json").exists()


def test_float32_is_float32_in_vllm_s_kernels_too(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = vllm_settings.environment(own_process=True)
    assert settings["TRITON_F32_DEFAULT"] == "ieee"
    assert settings["TRITON_CACHE_DIR"].startswith(str(tmp_path)), "apart from kernels of the other precision"
    assert "TRITON_F32_DEFAULT" not in vllm_settings.environment(own_process=False)


SERVER = """
import sys
from dayzero.serving import server

slow = '''import signal, sys, time
def end(*_):
    time.sleep(2)
    sys.exit(print("vLLM has ended", flush=True))
signal.signal(signal.SIGINT, end)
print("up", flush=True)
time.sleep(60)'''

with server._ends_on_signals() as ended_on:
    sys.exit(server._run([sys.executable, "-c", slow], "127.0.0.1", 9, "run", ended_on))
"""


def test_a_terminal_that_closes_twice_does_not_leave_vllm_behind() -> None:
    process = subprocess.Popen(heeding_signals("-c", SERVER), stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGHUP)
        assert process.communicate(timeout=30)[0] == "vLLM has ended\n"
        assert process.returncode == 0
    finally:
        process.kill()


def test_a_server_under_nohup_outlives_its_terminal() -> None:
    handlers = {signal.SIGINT: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with server._ends_on_signals() as heeded:
            assert heeded == [signal.SIGINT, signal.SIGTERM]
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.end_to_end
@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.full)])
def test_the_server_answers_a_chat_request_and_ends_cleanly(tmp_path, compiles):
    """vLLM compiles the model unless told not to, which takes longer than all else here."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": str(int(not compiles))}
    model = tiny_export(tmp_path / "lora" / "model")
    port = free_port()
    log = tmp_path / "log"
    arguments = ["--model", str(model), "--port", str(port), "--log", str(log)]
    process = subprocess.Popen(heeding_signals("-m", "dayzero.stages.serve", *arguments), env=environment)
    try:
        while "ready. Ask it with" not in (log.read_text() if log.exists() else ""):
            with pytest.raises(subprocess.TimeoutExpired):  # it must not end by itself
                process.wait(1)
        body = {"model": "lora", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
        assert answer["model"] == "lora"
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert 1 <= answer["usage"]["completion_tokens"] <= 8
    finally:
        process.send_signal(signal.SIGTERM if compiles else signal.SIGHUP)  # SIGHUP: the terminal was closed
        assert process.wait(60) == 0
