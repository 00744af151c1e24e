"""How many tokens a second the client of `halfbyte bench` takes: is it, or the server, the limit at high concurrency?

    python benchmarks/client.py [--vllm PATH] [--concurrency 256] [--steps 20 8 4]

A process of its own stands in for vLLM's server: it answers every request with one token a step, as an engine would,
with no model behind it. `vllm bench serve` puts the load on it that `halfbyte bench` puts on vLLM (128 tokens in and
128 out, two requests for every sequence). Where the client keeps up, tokens/s are near concurrency / step; where it
does not, they stay below, and so would every bench on that machine. No GPU is wanted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu.common import count, markdown, one_line, say
from benchmarks.gpu.shapes import write_tokenizer
from halfbyte.errors import HalfbyteError
from halfbyte.files import write_json
from halfbyte.serving import find_vllm
from halfbyte.serving.bench import Load, Loader, bench_words

TOKENS = 128
VOCABULARY = 32_000
TIMEOUT_S = 300.0
CHOICE = {"index": 0, "text": " w12345", "logprobs": None, "finish_reason": None, "stop_reason": None}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default=None, help="vLLM's executable or environment")
    parser.add_argument("--concurrency", type=count, default=256)
    parser.add_argument("--steps", type=float, nargs="+", default=[20, 8, 4], help="milliseconds of the engine's step")
    args = parser.parse_args()
    if min(args.steps) <= 0:
        parser.error("--steps wants milliseconds above 0")
    with one_line("client.py"):
        rows = [[f"{step:g}", f"{offered(args, step):,.0f}", f"{taken(args, step):,.0f}"] for step in args.steps]
    print("\n".join(markdown(["step, ms", "tokens/s offered", "tokens/s taken"], rows)))


def offered(args: argparse.Namespace, step: float) -> float:
    """What the stand-in writes in a second."""
    return args.concurrency / step * 1e3


def taken(args: argparse.Namespace, step: float) -> float:
    """What `vllm bench serve` says that it got."""
    install = find_vllm(args.vllm)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(port, step / 1e3), daemon=True)
    server.start()
    try:
        _listening(port, server)
        with tempfile.TemporaryDirectory() as name, Loader(install) as loader:
            place = Path(name)
            write_json(place / "config.json", {"model_type": "llama", "vocab_size": VOCABULARY})
            write_tokenizer(place, VOCABULARY)
            load = Load(args.concurrency, 2 * args.concurrency, TOKENS, TOKENS)
            words = bench_words(load, f"http://127.0.0.1:{port}", "stand-in", place, place / "result.json")
            say(f"a step of {step:g} ms")
            code = loader.run(words, place / "log", lambda: not server.is_alive())
            if code != 0:
                raise HalfbyteError(f"vllm bench serve failed: {(place / 'log').read_text()[-300:].strip()}")
            found = json.loads((place / "result.json").read_text())
    finally:
        server.terminate()
        server.join()
    if found["completed"] < 2 * args.concurrency:
        why = next((error for error in found.get("errors", []) if error), "no reason given")
        raise HalfbyteError(f"{found['completed']} of {2 * args.concurrency} requests were answered: {why[-200:]}")
    return float(found["output_throughput"])


def _listening(port: int, server: BaseProcess) -> None:
    """Wait until the stand-in takes connections. Raises HalfbyteError."""
    deadline = time.monotonic() + TIMEOUT_S
    while server.is_alive() and time.monotonic() < deadline:
        with socket.socket() as asked:
            if asked.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise HalfbyteError("the stand-in for the server did not start")


def serve(port: int, step: float) -> None:
    """Answer completions on that port until killed: TOKENS tokens each, one a step (seconds)."""
    asyncio.run(_serve(port, step))


async def _serve(port: int, step: float) -> None:
    left: dict[asyncio.Transport, int] = {}
    token = _chunk({"id": "cmpl-0", "object": "text_completion", "model": "x", "choices": [CHOICE], "usage": None})
    usage = {"prompt_tokens": TOKENS, "total_tokens": 2 * TOKENS, "completion_tokens": TOKENS}
    end = _chunk({"id": "cmpl-0", "object": "text_completion", "model": "x", "choices": [], "usage": usage})
    end += b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport, self.read = transport, b""

        def connection_lost(self, error: Exception | None) -> None:
            left.pop(self.transport, None)  # type: ignore[arg-type]

        def data_received(self, data: bytes) -> None:
            self.read += data
            head, whole, body = self.read.partition(b"\r\n\r\n")
            sizes = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
            if whole and len(body) >= int(sizes[0] if sizes else 0):
                self.read = b""
                self.transport.write(HEAD)  # type: ignore[attr-defined]
                left[self.transport] = TOKENS  # type: ignore[index]

    loop = asyncio.get_running_loop()
    await loop.create_server(Connection, "127.0.0.1", port, backlog=4096)
    due = loop.time()
    while True:
        due = max(due + step, loop.time() - step)
        await asyncio.sleep(max(0.0, due - loop.time()))
        for transport in list(left):
            left[transport] -= 1
            transport.write(token if left[transport] else token + end)
            if not left[transport]:
                del left[transport]


def _chunk(message: object) -> bytes:
    """A server-sent event as a chunk of HTTP."""
    event = b"data: " + json.dumps(message).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(event), event)


if __name__ == "__main__":
    main()
