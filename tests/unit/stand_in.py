"""Stand-ins for HTTP services, in this process: vLLM's completions computed by a tiny model, and a judge of chats."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


@contextmanager
def service(answer: Callable[[str, dict[str, Any] | None, Any], tuple[int, Any]]) -> Iterator[str]:
    """The URL of a server on 127.0.0.1 that says answer(path, body or None, headers) as (status, JSON)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.say(None)

        def do_POST(self) -> None:
            self.say(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def say(self, body: dict[str, Any] | None) -> None:
            status, tree = answer(self.path, body, self.headers)
            sent = json.dumps(tree).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def vllm_of(model: Any, tokenizer: Any) -> Callable[..., tuple[int, Any]]:
    """What vLLM's API would say for a transformers model: greedy, one token after the other, no cache."""
    lock = threading.Lock()

    def answer(path: str, body: dict[str, Any] | None, headers: Any) -> tuple[int, Any]:
        if body is None:
            return 200, {"data": [{"id": "tiny"}]}
        assert headers.get("Authorization") is None, "a key was sent to the local server"
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        with lock, torch.inference_mode():
            return 200, {
                "choices": [{"index": i, **_complete(model, tokenizer, p, body)} for i, p in enumerate(prompts)]
            }

    return answer


def _complete(model: Any, tokenizer: Any, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
    assert body["temperature"] == 0
    ids, said = list(prompt), []
    stops = body.get("stop_token_ids") or [tokenizer.eos_token_id]
    while len(said) < body["max_tokens"]:
        scores = model(torch.tensor([ids])).logits[0, -1].float()
        if allowed := body.get("allowed_token_ids"):
            scores[[i for i in range(len(scores)) if i not in allowed]] = -torch.inf
        ids.append(int(scores.argmax()))
        if ids[-1] in stops and not allowed:
            break
        said.append(ids[-1])
    text = tokenizer.decode(said, skip_special_tokens=True)
    for stop in body.get("stop") or []:
        text = text.partition(stop)[0]
    choice: dict[str, Any] = {"text": text}
    if body.get("return_tokens_as_token_ids"):
        choice["logprobs"] = {"tokens": [f"token_id:{token}" for token in said]}
    if "prompt_logprobs" in body or body.get("echo"):
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        own = [None] + [float(logprobs[t, ids[t + 1]]) for t in range(len(ids) - 1)]
        if body.get("echo"):
            best = [None] + [{"x": float(logprobs[t].max())} for t in range(len(ids) - 1)]
            own += [0.0] * (len(prompt) + 1 - len(own))  # where the model stopped at once
            best += [{"x": 0.0}] * (len(prompt) + 1 - len(best))
            choice["logprobs"] = {"token_logprobs": own, "top_logprobs": best}
        else:
            rows = [{str(token): {"logprob": value}} for token, value in zip(prompt, own)]
            choice["prompt_logprobs"] = [None, *rows[1:]]
    return choice
