"""The OpenAI-compatible server: start vLLM's, wait until it answers, show how to ask it, end it cleanly."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dayzero.console import log
from dayzero.errors import ConfigError
from dayzero.gpu_shares import own_gpus
from dayzero.serving.vllm_settings import environment, require_model, require_vllm

DEFAULT_CONTEXT = 4096
"""Tokens of context where none is asked for: on a CPU the whole context of a long one would not fit the cache."""
SECONDS_TO_END = 20


def serve(
    model: Path, *, name: str, host: str, port: int, dtype: str, max_model_len: int | None, trust_remote_code: bool
) -> int:
    """Serve `model` as `name` until ctrl-C; returns vLLM's exit code (0 after ctrl-C).

    Raises ConfigError for a folder without a model, code of the model's own that may not be run, a taken port or a
    missing vLLM.
    """
    from dayzero.pretrained import context_length, load_config

    require_model(model)
    require_vllm()
    _require_free(host, port)
    context = context_length(load_config(model, trust_remote_code))
    length = max_model_len or min(context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    # not the `vllm` command: it looks for a distribution called vllm, which the CPU build is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.resolve())]
    command += ["--served-model-name", name, "--host", host, "--port", str(port)]
    command += ["--dtype", dtype, "--max-model-len", str(length)]
    command += ["--trust-remote-code"] if trust_remote_code else []
    with own_gpus(1), _ends_on_signals() as ended_on:
        _require_free(host, port)  # still: a GPU may have been waited for
        log.info("starting vLLM on %s; the first answer takes about a minute", model)
        return _run(command, host, port, name, ended_on)


def _run(command: list[str], host: str, port: int, name: str, ended_on: list[signal.Signals]) -> int:
    """vLLM's exit code, or 0 when one of the signals ended it."""
    # a group of its own: on ctrl-C it is asked to end once, by us, and not killed under its feet
    process = subprocess.Popen(command, env=environment(own_process=False), start_new_session=True)
    try:
        if _wait_until_ready(process, host, port):
            log.info("ready. Ask it with:\n%s", curl_line(host, port, name))
        code = process.wait()
        log.info("vLLM ended with code %d", code)
        return code
    except KeyboardInterrupt:
        log.info("stopping")
        return 0
    finally:
        for number in ended_on:  # a terminal that closes may say so twice: vLLM's end must not be cut short
            signal.signal(number, signal.SIG_IGN)
        _end(process)


@contextmanager
def _ends_on_signals() -> Iterator[list[signal.Signals]]:
    """Inside, ctrl-C, SIGTERM and a terminal that closes raise `KeyboardInterrupt`, but for what is ignored already, as
    nohup does. Yields which."""
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in ends}
    heeded = [number for number in ends if before[number] is not signal.SIG_IGN]
    try:
        for number in heeded:
            signal.signal(number, _interrupt)
        yield heeded
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def curl_line(host: str, port: int, name: str) -> str:
    """A ready-to-paste chat request."""
    body = {"model": name, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}
    url = f"http://{_reachable(host)}:{port}/v1/chat/completions"
    return f"curl {url} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot listen on {host}:{port} ({error}): choose another with --port") from None


def _wait_until_ready(process: subprocess.Popen[bytes], host: str, port: int) -> bool:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{_reachable(host)}:{port}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    return False


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "") else host  # noqa: S104 (compared, not bound)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group: its engine is a process that would stay
            process.wait()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
