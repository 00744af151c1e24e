"""One load on a running server through `vllm bench serve`, and what came of it, a crash included.

The prompts are random token ids from a seed: two servers that get the same Load get the same prompts. Every request
writes its full number of tokens (the end-of-text token is ignored), greedily.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.files import write_json
from halfbyte.serving.child import Child
from halfbyte.serving.client import Client
from halfbyte.serving.install import VllmInstall, shebang
from halfbyte.serving.log import read_log, root_error
from halfbyte.serving.process import Server

OK, OUT_OF_MEMORY, CRASHED, FAILED = "ok", "out of memory", "crashed", "failed"
NO_REUSE = ("--no-enable-prefix-caching",)
"""For a server that is measured: a prompt sent twice (warming up) must be read twice."""
QUIETLY = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
LATENCIES = ("ttft", "itl", "e2el")
PERCENTILES = (50, 95, 99)
CLIENT_GRACE_S = 5.0
DYING_S = 10.0
"""How long a server whose requests fail has to be gone, before it is said to live."""
RUN_TIMEOUT_S = 3600.0
_POLL_S = 0.1
_GONE = 1 << 16
"""In the place of an exit status: nobody is there to tell it."""
FORKER = Path(__file__).with_name("forker.py")
IMPORTED = ("vllm.entrypoints.cli.main", "vllm.entrypoints.cli.serve", "vllm.entrypoints.cli.benchmark.main",
            "vllm.entrypoints.cli.benchmark.serve", "vllm.benchmarks.serve")  # fmt: skip
"""What `vllm bench serve` spends most of its time on before it sends anything."""
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|No available memory for the cache|larger than the available KV cache memory"
    r"|less than desired GPU memory utilization|Cannot allocate memory|bad_alloc|MemoryError|not enough memory"
    r"|killed by the system",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Load:
    """What is asked of a server at once: `concurrency` requests in flight, `requests` in all, their tokens in and out.

    warmups   requests before the clock starts
    """

    concurrency: int
    requests: int
    input_tokens: int
    output_tokens: int
    seed: int = 0
    warmups: int = 0


def bench_words(load: Load, url: str, model: str, tokenizer: str | Path, result: Path) -> list[str]:
    """The words after `vllm` for a load; `model` is the served name."""
    numbers = {
        "--random-input-len": load.input_tokens,
        "--random-output-len": load.output_tokens,
        "--num-prompts": load.requests,
        "--max-concurrency": load.concurrency,
        "--num-warmups": load.warmups,
        "--seed": load.seed,
        "--temperature": 0,
        "--ready-check-timeout-sec": 0,
    }
    named = {
        "--base-url": url,
        "--model": model,
        "--tokenizer": str(tokenizer),
        "--dataset-name": "random",
        "--percentile-metrics": ",".join(LATENCIES),
        "--metric-percentiles": ",".join(map(str, PERCENTILES)),
        "--result-dir": str(result.parent),
        "--result-filename": result.name,
    }
    pairs = [word for flag, value in {**named, **numbers}.items() for word in (flag, str(value))]
    return ["bench", "serve", *pairs, "--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm"]


class Loader:
    """`vllm bench serve`, as often as is asked. In `with Loader(install) as loader` its imports, of 5 to 20 seconds,
    are done once and beside what else goes on (forker.py). Where the executable is no script of the Python that it
    names, or the forker does not live, each run is a process of its own."""

    def __init__(self, install: VllmInstall) -> None:
        self.install = install
        self._place: tempfile.TemporaryDirectory[str] | None = None
        self._forker: Child | None = None
        self._count = 0

    def __enter__(self) -> Loader:
        if shebang(self.install.executable)[:1] == [str(self.install.python)]:
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._forker:
            self._forker.stop()
        if self._place:
            self._place.cleanup()
        self._forker = self._place = None

    def _start(self) -> None:
        self._place, self._count = tempfile.TemporaryDirectory(prefix="halfbyte-", ignore_cleanup_errors=True), 0
        words = [str(self.install.python), str(FORKER), str(self.install.executable), self._place.name]
        with Path(os.devnull).open("wb") as nowhere:
            self._forker = Child([*words, ",".join(IMPORTED)], QUIETLY, nowhere, CLIENT_GRACE_S)

    def run(self, words: Sequence[str], log_path: Path, until: Callable[[], bool]) -> int | None:
        """`vllm WORDS`, its output into a log; its exit status, or None where `until` came before its end."""
        if self._forker and self._place and self._forker.poll() is None:
            ended = self._forked(self._forker, Path(self._place.name), words, log_path, until)
            if ended is None:  # what runs is ended with all the rest
                self.__exit__()
                self._start()
            if ended != _GONE:
                return ended
        with log_path.open("wb") as log:
            child = Child([str(self.install.executable), *words], QUIETLY, log, CLIENT_GRACE_S)
        try:
            return _awaited(child.poll, until)
        finally:
            child.stop()

    def _forked(
        self, forker: Child, place: Path, words: Sequence[str], log_path: Path, until: Callable[[], bool]
    ) -> int | None:
        """As `run`; _GONE where the forker ended and told nothing."""
        told = place / f"{self._count}.code"

        def code() -> int | None:
            gone = forker.poll() is not None  # asked first: it may have told just before
            return int(told.read_text()) if told.exists() else _GONE if gone else None

        try:
            write_json(place / f"{self._count}.json", {"words": list(words), "log": str(log_path.resolve())})
        except HalfbyteError:  # its place is gone, or full
            forker.stop()
            return _GONE
        self._count += 1
        return _awaited(code, until)


def run_load(server: Server, loader: Loader, load: Load, tokenizer: str | Path, log_path: Path) -> dict[str, Any]:
    """Put `load` on the server; returns the run.

    status   "ok"; "failed": requests were refused or the client broke; "out of memory" or "crashed": the server ended
    reason   one line, empty where ok
    and, where the client ended by itself, its figures (see `figures`).
    """
    result = log_path.with_suffix(".vllm.json").resolve()
    result.unlink(missing_ok=True)
    with Client(server.url) as client:
        words = bench_words(load, server.url, client.model, tokenizer, result)
    deadline = time.monotonic() + RUN_TIMEOUT_S
    code = loader.run(words, log_path, lambda: not server.running or time.monotonic() > deadline)
    try:
        raw = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raw = None
    result.unlink(missing_ok=True)
    return _outcome(server, load, code, raw, log_path)


def figures(raw: Mapping[str, Any], load: Load) -> dict[str, Any]:
    """What is kept of vLLM's result: rates, latencies {p50, p95, p99} in ms (None where nothing was measured), counts.

    With one token out there is no time between tokens.
    """
    kept: dict[str, Any] = {
        "output_tokens_per_second": float(raw["output_throughput"]),
        "requests_per_second": float(raw["request_throughput"]),
        "total_tokens_per_second": float(raw["total_token_throughput"]),
        "completed": int(raw["completed"]),
        "failed": load.requests - int(raw["completed"]),
        "seconds": float(raw["duration"]),
    }
    for name in LATENCIES:
        known = raw["completed"] and not (name == "itl" and load.output_tokens < 2)
        kept[f"{name}_ms"] = {f"p{p}": float(raw[f"p{p}_{name}_ms"]) if known else None for p in PERCENTILES}
    return kept


def ended(reason: str) -> str:
    """The status of a server that ended for that reason."""
    return OUT_OF_MEMORY if _MEMORY.search(reason) else CRASHED


def failure(server: Server, error: HalfbyteError) -> dict[str, str]:
    """{status, reason} of a call that a server did not answer: what it ended with, else the error itself."""
    if not _gone(server):
        return {"status": FAILED, "reason": str(error)}
    reason = server.reason()
    return {"status": ended(reason), "reason": reason}


def _awaited(code: Callable[[], int | None], until: Callable[[], bool]) -> int | None:
    """The exit status that `code` gives in the end; None where `until` came first."""
    while (status := code()) is None:
        if until():
            return None
        time.sleep(_POLL_S)
    return status


def _outcome(server: Server, load: Load, code: int | None, raw: Any, log_path: Path) -> dict[str, Any]:
    measured = figures(raw, load) if code == 0 and raw else {}
    if code == 0 and measured and not measured["failed"]:
        return {"status": OK, "reason": "", **measured}
    if _gone(server):
        reason = server.reason()
        return {"status": ended(reason), "reason": reason, **measured}
    if measured:
        first = next((" ".join(str(error).split()) for error in raw.get("errors", []) if error), "no reason given")
        reason = f"{measured['failed']} of {load.requests} requests failed: {first[-300:]}"
    elif code is None:
        reason = f"the load was not done within {RUN_TIMEOUT_S:.0f} s"
    else:
        reason = f"vllm bench serve failed: {root_error(read_log(log_path))}"
    return {"status": FAILED, "reason": reason, **measured}


def _gone(server: Server) -> bool:
    """Whether the server ended, or is about to: its engine no longer answers."""
    deadline = time.monotonic() + DYING_S
    with Client(server.url) as client:
        while server.running and not client.healthy():
            if time.monotonic() > deadline:
                return True
            time.sleep(_POLL_S)
    return not server.running
