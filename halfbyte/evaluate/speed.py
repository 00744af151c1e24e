"""Serving speed in real vLLM: BF16, the 4-bit artifact and other configurations of it, in turn on the same prompts.

Every run (a configuration, a concurrency, a repeat) is one file below OUTPUT/bench, under a key of all that it depends
on: command, vLLM, weights, machine, prompts. A run that is there under its key is not done again, so that a killed
bench goes on where it was, and another concurrency or configuration only adds. What failed is tried again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.served import format_of
from halfbyte.evaluate.speed_machine import hardware
from halfbyte.evaluate.stability import PROMPT_ROOM, Watch, observe
from halfbyte.files import locked, make_directory, write_json
from halfbyte.models.checkpoint import read_json
from halfbyte.platforms import Platform
from halfbyte.serving import ServeCommand, Server, VllmInstall, serve_command
from halfbyte.serving.bench import NO_REUSE, QUIETLY, Load, Loader, ended, failure, run_load
from halfbyte.serving.bench_memory import PeakMemory, reader
from halfbyte.types import Progress, Quiet

BASELINE, MODEL = "baseline", "model"
PREFILL, STABILITY = "prefill", "stability"
RUNS = "bench"
"""The directory of single runs and vLLM's logs, below the output."""
PREFILL_PROMPTS = 16
ROOM = 16
"""Tokens of context beyond prompt and answer: a prompt of random ids may be read as a few more."""
FEWEST = 8


@dataclass(frozen=True)
class Variant:
    """One server to measure: a directory and words for vLLM beyond what `serve` would say. `name` is a file name;
    without: flags that are not taken from measured speeds."""

    name: str
    directory: Path
    words: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchRequest:
    """What to measure.

    variants    "baseline" (BF16) and "model", where wanted, then further configurations of the model
    requests    of a run; None: four for every sequence at once, and 8 at least
    repeats     of each run, with other prompts each time; 2 at least, or there is no interval
    turns       how often every server is started; repeats are spread over the turns
    prefill     tokens of the long prompts that are answered by one token; 0: not measured
    extra       words for every vLLM
    watch       what to look for in long generations (halfbyte.evaluate.stability), or None
    loads       whether speed is measured; False: only what `watch` looks for, of the same servers
    """

    variants: tuple[Variant, ...]
    platform: Platform
    concurrency: tuple[int, ...]
    input_tokens: int = 128
    output_tokens: int = 128
    requests: int | None = None
    repeats: int = 3
    turns: int = 1
    prefill: int = 0
    seed: int = 0
    extra: tuple[str, ...] = ()
    watch: Watch | None = None
    loads: bool = True

    @cached_property
    def points(self) -> dict[str, Load]:
        """The loads by name: c1, c16, … and prefill."""
        if not self.loads:
            return {}
        found = {f"c{level}": self._load(level) for level in self.concurrency}
        if self.prefill:
            prompts = min(PREFILL_PROMPTS, self.requests or PREFILL_PROMPTS)
            found[PREFILL] = Load(min(prompts, max(self.concurrency)), prompts, self.prefill, 1)
        return found

    @property
    def context(self) -> int:
        """--max-model-len that holds everything that is asked for."""
        longest = [self.input_tokens + self.output_tokens, self.prefill + 1]
        return max([*longest, self.watch.tokens + PROMPT_ROOM if self.watch else 0]) + ROOM

    def _load(self, level: int) -> Load:
        asked = self.requests or max(FEWEST, 4 * level)
        return Load(level, max(asked, level), self.input_tokens, self.output_tokens)


@dataclass
class Job:
    """One run that is wanted: where its result lies, and the key under which it counts. load None: stability."""

    variant: Variant
    point: str
    load: Load | None
    turn: int
    file: Path
    key: str = ""
    result: dict[str, Any] | None = None


@dataclass
class Measured:
    """All runs, and what they were measured with."""

    request: BenchRequest
    install: VllmInstall
    commands: dict[str, ServeCommand]
    jobs: list[Job]
    hardware: str
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def runs(self, variant: str, point: str) -> list[dict[str, Any]]:
        """The results of a configuration at a point, in the order of repeats."""
        found = [job.result for job in self.jobs if (job.variant.name, job.point) == (variant, point)]
        return [result for result in found if result is not None]


def measure(
    request: BenchRequest, output: Path, install: VllmInstall, *, force: bool = False, progress: Progress | None = None
) -> Measured:
    """Do all runs that are not there yet. `force`: all of them.

    A server that does not start, runs out of memory or crashes is the result of its runs (status and reason).
    Raises UsageError for what cannot be asked (a format that the platform does not load, a sequence beyond the model's
    context, fewer than two repeats), HalfbyteError where `output` cannot be written.
    """
    started = time.monotonic()
    _refuse(request)
    with locked(output):
        if force:
            shutil.rmtree(output / RUNS, ignore_errors=True)
        commands = {variant.name: command_for(request, variant, install) for variant in request.variants}
        found = Measured(request, install, commands, [], hardware(request.platform.capabilities.accelerator))
        found.notes = list(dict.fromkeys(note for command in commands.values() for note in command.notes))
        found.jobs = _jobs(found, output / RUNS)
        work = _Work(found, progress or Quiet())
        for turn in range(request.turns):
            ordered = request.variants if turn % 2 == 0 else request.variants[::-1]
            for variant in ordered:
                work.sit([j for j in found.jobs if j.variant is variant and j.turn == turn and j.result is None])
    found.seconds = time.monotonic() - started
    return found


def command_for(request: BenchRequest, variant: Variant, install: VllmInstall) -> ServeCommand:
    """What `serve` would say for it, the variant's words, and no reuse of prompts."""
    words = (*variant.words, *request.extra)
    extra = words if "--enable-prefix-caching" in words else (*NO_REUSE, *words)
    return serve_command(
        variant.directory,
        format_of(variant.directory),
        request.platform,
        vllm_version=install.version,
        context=request.context,
        concurrency=max(request.concurrency),
        extra=extra,
        without=variant.without,
    )


def context_limit(models: Sequence[Path]) -> int | None:
    """The longest sequence that all of these take; None where none of them says."""
    limits = [read_json(model / "config.json").get("max_position_embeddings") for model in models]
    return min((limit for limit in limits if limit), default=None)


def _refuse(request: BenchRequest) -> None:
    names = [variant.name for variant in request.variants]
    if len(set(names)) < len(names):
        raise UsageError(f"two configurations of one name: {', '.join(names)}")
    if request.repeats < 2:
        raise UsageError("one repeat gives no interval: ask for two or more (--repeats)")
    if not 1 <= request.turns <= request.repeats:
        raise UsageError(f"{request.turns} turns want as many repeats: ask for --repeats {max(2, request.turns)}")
    limit = context_limit([variant.directory for variant in request.variants])
    if limit is not None and request.context > limit:
        raise UsageError(
            f"sequences of up to {request.context} tokens are asked for, and the model takes {limit}: "
            "ask for a smaller --input, --output, --prefill or --long"
        )


def _jobs(found: Measured, place: Path) -> list[Job]:
    """Every run, with the result that is there under its key."""
    request, jobs = found.request, []
    for variant in request.variants:
        for point, load in request.points.items():
            level = 0 if point == PREFILL else load.concurrency
            for repeat in range(request.repeats):
                seed = request.seed * 1_000_000 + level * 100 + repeat
                own = replace(load, seed=seed)
                file = place / variant.name / f"{point}-r{repeat}.json"
                jobs.append(Job(variant, point, own, repeat % request.turns, file))
        if request.watch and variant.name in (BASELINE, MODEL):
            file = place / variant.name / f"{STABILITY}.json"
            jobs.append(Job(variant, STABILITY, None, request.turns - 1, file))
    for job in jobs:
        command, what = found.commands[job.variant.name], job.load or request.watch
        parts = [command.argv[3:], command.env, _stamp(job.variant.directory), found.install.version, found.hardware]
        job.key = hashlib.sha256(json.dumps([parts, asdict(what)], sort_keys=True).encode()).hexdigest()  # type: ignore[arg-type]
        there = read_json(job.file) if job.file.is_file() else {}
        if there.get("key") == job.key and there.get("status") == "ok":
            job.result = there
    return jobs


def _stamp(directory: Path) -> list[Any]:
    """Names, sizes and times of a model's files: cheap, and another for other weights."""
    files = [directory / "config.json", *sorted(directory.glob("*.safetensors"))]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


class _Work:
    def __init__(self, found: Measured, progress: Progress) -> None:
        self.found, self.progress = found, progress
        self.broken: dict[str, dict[str, Any]] = {}
        self.warm: set[str] = set()
        """Points that the running server has seen."""

    def sit(self, jobs: Sequence[Job]) -> None:
        """Start the server of these runs (all of one variant) and do them; again where a run ended the server."""
        left = list(jobs)
        while left:
            name = left[0].variant.name
            if name in self.broken:
                self._settle(left, self.broken[name])
                return
            place = make_directory(left[0].file.parent)
            log = place / f"vllm-{len(list(place.glob('vllm-*.log')))}.log"
            server = Server(
                self.found.commands[name], self.found.install, log_path=log, env=QUIETLY, progress=self.progress
            )
            with ExitStack() as stack:
                try:
                    loader = stack.enter_context(Loader(self.found.install))
                    stack.enter_context(server)
                except HalfbyteError as error:
                    status = ended(str(error))
                    self.broken[name] = {"status": status, "reason": str(error).removeprefix("vLLM failed: ")}
                    continue
                left = self._serve(server, loader, left, stack)

    def _serve(self, server: Server, loader: Loader, jobs: list[Job], stack: ExitStack) -> list[Job]:
        """Do runs until none is left or the server has ended; returns those left. What failed is not repeated."""
        read = reader(self.found.request.platform.capabilities.accelerator, server.pid)
        memory = stack.enter_context(PeakMemory(read))
        self.warm.clear()
        self.progress.start(f"measuring {jobs[0].variant.name}", len(jobs))
        while jobs:
            job = jobs.pop(0)
            result = self._run(server, loader, job)
            facts = server.facts
            self._keep(
                job,
                {
                    **result,
                    "load_seconds": round(server.load_seconds, 2),
                    "peak_device_bytes": memory.peak,
                    "weight_gib": facts.weight_gib,
                    "kv_cache_tokens": facts.kv_cache_tokens,
                    "kernels": list(facts.kernels),
                },
            )
            self.progress.advance(1, f"{job.point}: {result['status']}")
            if result["status"] != "ok":
                same = [other for other in jobs if other.point == job.point]
                jobs = [other for other in jobs if other.point != job.point]
                self._settle(same, {"status": result["status"], "reason": result["reason"]})
            if not server.running:
                break
        return jobs

    def _run(self, server: Server, loader: Loader, job: Job) -> dict[str, Any]:
        if job.load is not None:
            load = replace(job.load, warmups=0 if job.point in self.warm else job.load.concurrency)
            self.warm.add(job.point)
            log = job.file.with_suffix(".log")
            try:
                return run_load(server, loader, load, job.variant.directory, log)
            except HalfbyteError as error:
                return failure(server, error)
        assert self.found.request.watch is not None
        watch = self.found.request.watch
        return observe(server, watch if job.variant.name == MODEL else replace(watch, seconds=0.0))

    def _settle(self, jobs: Sequence[Job], result: dict[str, Any]) -> None:
        for job in jobs:
            self._keep(job, result)

    def _keep(self, job: Job, result: dict[str, Any]) -> None:
        job.result = {"schema": 1, "kind": "bench-run", "key": job.key, "variant": job.variant.name, **result}
        make_directory(job.file.parent)
        write_json(job.file, job.result)
