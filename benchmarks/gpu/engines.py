"""vLLM engines that load together on the cards of this machine and are timed one by one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import GIB, GRACE_S, POLL_S, card_name, digest, on_card, say
from halfbyte.evaluate.speed_room import SHARE, SPACE_FLAG, cache_tokens, token_bytes
from halfbyte.files import make_directory, write_json, write_text
from halfbyte.serving import LogFacts, VllmInstall, parse_log, root_error
from halfbyte.serving.bench import Load
from halfbyte.serving.child import Child
from halfbyte.serving.log import read_log

OFFLINE = Path(__file__).with_name("offline.py")
TAIL = 4000
"""Characters of a log that are kept of what failed."""
STEP_TOKENS = 8192
"""--max-num-batched-tokens, as `vllm serve` has it on such a card."""


def engine_words(config: Mapping[str, Any], kv: str, points: Sequence[Mapping[str, Any]]) -> tuple[list[str], float]:
    """(words for vLLM that hold every point's load and no more, so that engines can share a card; GiB of KV cache)."""
    loads = [Load(p["prompts"], p["prompts"], p["input"], p["output"]) for p in points]
    space = token_bytes(config, kv) * cache_tokens(loads, 0)
    flags = {
        "--dtype": "bfloat16",
        "--kv-cache-dtype": kv,
        "--max-model-len": str(max(p["input"] + p["output"] for p in points) + 16),
        "--max-num-seqs": str(max(p["prompts"] for p in points)),
        "--max-num-batched-tokens": str(STEP_TOKENS),
        SPACE_FLAG: str(space),
        SHARE[0]: SHARE[1],
    }
    return [*(word for pair in flags.items() for word in pair), "--no-enable-prefix-caching"], space / GIB


def python_of(install: VllmInstall) -> str:
    """The Python that has vLLM: its environment's own, or this one where `vllm` is a wrapper that names none."""
    return str(install.python) if install.python.name.startswith("python") else sys.executable


def log_tail(path: Path) -> str:
    """The last of a log, as results keep it."""
    return read_log(path)[-TAIL:]


@dataclass
class Engine:
    """One configuration to time. `words`: for vLLM; `gib`: device memory that it takes; `facts`: the caller's own;
    `weights`: names what the model's directory holds, or is going to.

    After `run_engines`: status ("ok", "failed" or "not run"), reason, seconds by point, what the log says.
    """

    name: str
    model: Path
    words: tuple[str, ...]
    gib: float
    facts: dict[str, Any] = field(default_factory=dict)
    status: str = "not run"
    reason: str = ""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    load_seconds: float | None = None
    log: Path | None = None
    weights: str = ""

    def logged(self) -> LogFacts:
        return parse_log(read_log(self.log) if self.log else "")

    def result(self) -> dict[str, Any]:
        """Plain data for a result file."""
        told = self.logged()
        return {
            "name": self.name,
            **self.facts,
            "words": list(self.words),
            "status": self.status,
            "reason": self.reason,
            "kernels": list(told.kernels),
            "weights_gib": told.weight_gib,
            "kv_cache_tokens": told.kv_cache_tokens,
            "load_seconds": self.load_seconds,
            "seconds": self.seconds,
            "log": log_tail(self.log) if self.log and self.status == "failed" else "",
        }


@dataclass(frozen=True)
class Work:
    """What every engine is asked: `points` [{name, prompts, input, output}], each `repeats` times.

    timeout   seconds for an engine to load, and again to be timed
    loading   seconds that a round's engines take to load together; timing: what each takes then. A round has as many
              engines on a card as there is time for
    """

    points: Sequence[dict[str, Any]]
    repeats: int
    vocab: int
    timeout: float = 420.0
    loading: float = 120.0
    timing: float = 40.0


def run_place(engine: Engine, work: Work, install: VllmInstall, place: Path) -> Path:
    """The directory of an engine's timings: another for all that they depend on beside their load."""
    facts = {"weights": engine.weights, "words": list(engine.words), "repeats": work.repeats, "vocab": work.vocab}
    return place / f"{engine.name}-{digest({**facts, 'vllm': install.version, 'hardware': card_name()})}"


def to_time(engines: Iterable[Engine], work: Work, install: VllmInstall, place: Path) -> list[Engine]:
    """The engines of which a point is still to be timed; all take what is there already."""
    left = []
    for engine in engines:
        there = run_place(engine, work, install, place)
        lines = read_lines(there / "result.jsonl")
        engine.seconds = seconds_of(lines, work.points)
        if engine.seconds:
            engine.log = there / "vllm.log"
            engine.load_seconds = next((line["load"] for line in lines if "load" in line), None)
        if len(engine.seconds) == len(work.points):
            engine.status = "ok"
        else:
            left.append(engine)
    return left


def seconds_of(lines: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The seconds of each of these points that was timed, by its name."""
    return {point["name"]: line["seconds"] for point in points for line in lines if line.get("point") == point}


class Running:
    """An engine's process on a card, from its start to `stop`: it times the points that were not timed yet."""

    def __init__(self, engine: Engine, card: str, work: Work, install: VllmInstall, place: Path) -> None:
        self.engine, self.work = engine, work
        there = make_directory(run_place(engine, work, install, place))
        self.result, self.go = there / "result.jsonl", there / "go"
        self.go.unlink(missing_ok=True)
        kept = [line for line in read_lines(self.result) if "point" in line]
        write_text(self.result, "".join(json.dumps(line) + "\n" for line in kept))
        timed = seconds_of(kept, work.points)
        missing = [point for point in work.points if point["name"] not in timed]
        spec = {"model": str(engine.model), "words": list(engine.words), "points": missing}
        spec |= {"repeats": work.repeats, "vocab": work.vocab, "result": str(self.result), "go": str(self.go)}
        write_json(there / "spec.json", spec)
        engine.log = there / "vllm.log"
        with engine.log.open("ab" if timed else "wb") as log:
            command = [python_of(install), str(OFFLINE), str(there / "spec.json")]
            self.child = Child(command, on_card(card), log, GRACE_S)

    def loaded(self, deadline: float) -> bool:
        """Wait until the engine is ready; False where it is not going to be (the engine then has failed)."""
        return self._await(lambda lines: any("ready" in line for line in lines), deadline)

    def measure(self, deadline: float) -> None:
        """Tell it to go and wait for the end; every point that was done is kept, whatever comes after."""
        self.go.touch()
        if self._await(lambda lines: any("done" in line for line in lines), deadline):
            self.engine.status = "ok"
        say(f"{self.engine.name}: {self.engine.status} {self.engine.reason}")

    def stop(self) -> None:
        self.child.stop()

    def _await(self, there: Callable[[list[dict[str, Any]]], bool], deadline: float) -> bool:
        engine = self.engine
        while True:
            over = self.child.poll() is not None
            lines = read_lines(self.result)
            engine.load_seconds = next((line["ready"] for line in lines if "ready" in line), engine.load_seconds)
            engine.seconds = seconds_of(lines, self.work.points)
            if there(lines):
                return True
            late = time.monotonic() > deadline
            if over or late:
                engine.status = "failed"
                assert engine.log is not None
                engine.reason = "the time was over" if late else root_error(read_log(engine.log))
                return False
            time.sleep(POLL_S)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines that is being written; none where it is not there."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def rounds(engines: Sequence[Engine], lanes: int, gib: float, abreast: int) -> Iterator[list[list[Engine]]]:
    """The engines in their order, for each round a list by lane (card): as many as its memory holds, `abreast` at most.

    An engine that is larger than a card has a round of its own (and fails there with its own reason).
    """
    left = list(engines)
    while left:
        taken: list[list[Engine]] = [[] for _ in range(lanes)]
        for lane in taken:
            while left and len(lane) < abreast and (not lane or sum(e.gib for e in lane) + left[0].gib <= gib):
                lane.append(left.pop(0))
        yield taken


def run_engines(
    engines: Sequence[Engine],
    work: Work,
    install: VllmInstall,
    place: Path,
    gpus: Sequence[str],
    *,
    gib: float,
    abreast: int,
    prepare: Callable[[Engine], None] = lambda engine: None,
    deadline: float = float("inf"),
    least: float = 0.0,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Load and time every engine; what was timed before is taken (`to_time`). Those of a round load together on all
    cards; when all are ready, each card times its own one after the other, so that nothing else computes beside a
    measurement.

    gib        a card's memory; abreast: how many engines share it
    prepare    makes what an engine needs (its model) before it is started
    deadline   of time.monotonic(): no round begins with less than `least` seconds left, and what runs then is ended
    after      called after each measured engine, with nothing: the place to write results
    """
    waiting = to_time(engines, work, install, place)
    while waiting:
        left = deadline - time.monotonic()
        if left < least:
            for engine in waiting:
                engine.reason = "the time was over before it began"
            return
        fitting = min(abreast, max(1.0, (left - work.loading) / work.timing))
        lanes = next(rounds(waiting, len(gpus), gib, int(fitting)))
        taken = [engine for lane in lanes for engine in lane]
        waiting = [engine for engine in waiting if engine not in taken]
        say("loading " + "; ".join(f"{g or 'cpu'}: {', '.join(e.name for e in lane)}" for g, lane in zip(gpus, lanes)))
        running: list[list[Running]] = [[] for _ in lanes]
        try:
            start_round(lanes, running, work, install, place, gpus, prepare)
            limit = min(deadline - work.timing * max(map(len, lanes)), time.monotonic() + work.timeout)
            ready = [[one for one in lane if one.loaded(limit)] for lane in running]
            stop_all(one for lane in running for one in lane if one.engine.status == "failed")
            say(f"timing {sum(map(len, ready))} of {sum(map(len, running))}")
            with ThreadPoolExecutor(len(gpus)) as pool:
                list(pool.map(lambda lane: time_lane(lane, work, deadline, after), ready))
        finally:
            stop_all(one for lane in running for one in lane)
        after()


def start_round(
    lanes: list[list[Engine]],
    running: list[list[Running]],
    work: Work,
    install: VllmInstall,
    place: Path,
    gpus: Sequence[str],
    prepare: Callable[[Engine], None],
) -> None:
    """Make each engine's model and start it, in order, so that the next model is written while the first one loads."""
    widest = max(map(len, lanes), default=0)
    for index in range(widest):
        for lane, started, card in zip(lanes, running, gpus):
            if index < len(lane):
                engine = lane[index]
                try:
                    prepare(engine)
                    started.append(Running(engine, card, work, install, place))
                except Exception as error:
                    engine.status, engine.reason = "failed", f"{type(error).__name__}: {error}"


def time_lane(lane: Sequence[Running], work: Work, deadline: float, after: Callable[[], None]) -> None:
    for one in lane:
        one.measure(min(deadline, time.monotonic() + work.timeout))
        one.stop()
        after()


def stop_all(running: Iterable[Running]) -> None:
    these = list(running)
    if these:
        with ThreadPoolExecutor(len(these)) as pool:
            list(pool.map(Running.stop, these))
