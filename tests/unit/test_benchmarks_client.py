"""benchmarks/client.py: its stand-in for a server answers as vLLM does, a token a step."""

from __future__ import annotations

import json
import multiprocessing
import socket
import time

import httpx
import pytest

from benchmarks.client import TOKENS, _listening, serve

STEP_S = 0.002


@pytest.fixture
def url() -> object:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(port, STEP_S), daemon=True)
    server.start()
    _listening(port, server)
    yield f"http://127.0.0.1:{port}/v1/completions"
    server.terminate()
    server.join()


def test_every_request_gets_all_tokens_one_a_step(url: str) -> None:
    with httpx.stream("POST", url, json={"prompt": "x" * 9000, "stream": True}) as answer:
        told = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert told.pop() == "[DONE]"
    *tokens, last = map(json.loads, told)
    assert len(tokens) == TOKENS and all(token["choices"][0]["text"] for token in tokens)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == TOKENS
    began = time.monotonic()
    with httpx.stream("POST", url, json={"prompt": "x"}) as answer:
        assert sum(1 for line in answer.iter_lines() if line) == TOKENS + 2
    assert time.monotonic() - began >= 0.9 * TOKENS * STEP_S, "a token takes a step"
