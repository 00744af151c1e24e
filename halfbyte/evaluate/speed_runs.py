"""The runs of a bench: servers that start one by one, or several at once, and are loaded alone.

Every run (a configuration, a concurrency, a repeat) is one file below OUTPUT/bench, under a key of all that it depends
on: command, vLLM, weights, machine, prompts. A run that is there under its key is not done again, so that a killed
bench goes on where it was, and another concurrency or configuration only adds. What failed is tried again.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from typing import Any

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.speed import (
    BASELINE,
    MODEL,
    PREFILL,
    RUNS,
    STABILITY,
    BenchRequest,
    Job,
    Measured,
    command_for,
    context_limit,
)
from halfbyte.evaluate.speed_machine import hardware
from halfbyte.evaluate.speed_room import SHARE, SPACE_FLAG, Lane, devices, lanes, spread, taken
from halfbyte.evaluate.stability import observe
from halfbyte.files import locked, make_directory, write_json
from halfbyte.models.checkpoint import read_json
from halfbyte.serving import ServeCommand, Server, VllmInstall
from halfbyte.serving.bench import CRASHED, OUT_OF_MEMORY, QUIETLY, Loader, ended, failure, run_load
from halfbyte.serving.bench_memory import PeakMemory, reader
from halfbyte.serving.cards import on_cards
from halfbyte.serving.process import START_TIMEOUT_S
from halfbyte.types import Progress, Quiet

ANYWHERE = Lane((), 0)
"""Of a server that has its devices for itself."""
POLL_S = 0.2
INTERRUPTED, OVER = "interrupted", "the time was over"


def measure(
    request: BenchRequest,
    output: Path,
    install: VllmInstall,
    *,
    force: bool = False,
    progress: Progress | None = None,
    seconds: float = math.inf,
    partial: bool = False,
) -> Measured:
    """Do all runs that are not there yet. `force`: all of them.

    seconds   no run begins after so many, and a server that is not ready then is given up
    partial   where it is interrupted, what was measured until then is returned; `stopped` says so
    A server that does not start, runs out of memory or crashes is the result of its runs (status and reason).
    Raises UsageError for what cannot be asked (a format that the platform does not load, a sequence beyond the model's
    context, fewer than two repeats), HalfbyteError where `output` cannot be written.
    """
    started = time.monotonic()
    if request.together > 1 and not request.platform.capabilities.accelerator:
        request = replace(request, together=1)
        (progress or Quiet()).say("servers are loaded one by one where there is no GPU")
    _refuse(request)
    with locked(output):
        if force:
            shutil.rmtree(output / RUNS, ignore_errors=True)
        commands = {variant.name: command_for(request, variant, install) for variant in request.variants}
        widest = max(devices(command) for command in commands.values())
        machine = hardware(request.platform.capabilities.accelerator, widest)
        found = Measured(request, install, commands, [], machine, output / RUNS)
        found.notes = list(dict.fromkeys(note for command in commands.values() for note in command.notes))
        found.jobs = _jobs(found)
        work = _Work(found, progress or Quiet(), started + seconds)
        try:
            for turn in range(request.turns):
                ordered = request.variants if turn % 2 == 0 else request.variants[::-1]
                todo = [job for job in found.jobs if job.turn == turn and job.result is None]
                work.sit([job for variant in ordered for job in todo if job.variant is variant])
        except KeyboardInterrupt:
            if not partial:
                raise
            found.stopped = INTERRUPTED
    if any(job.result is None for job in found.jobs):
        found.stopped = found.stopped or OVER
    found.seconds = time.monotonic() - started
    return found


def _stop(servers: Mapping[str, Server]) -> None:
    """End servers, all at once."""
    them = list(servers.values())
    if them:
        with ThreadPoolExecutor(len(them)) as pool:
            list(pool.map(Server.stop, them))


def _refuse(request: BenchRequest) -> None:
    names = [variant.name for variant in request.variants]
    if len(set(names)) < len(names):
        raise UsageError(f"two configurations of one name: {', '.join(names)}")
    if request.repeats < 2:
        raise UsageError("one repeat gives no interval: ask for two or more (--repeats)")
    if not 1 <= request.turns <= request.repeats:
        raise UsageError(f"{request.turns} turns want as many repeats: ask for --repeats {max(2, request.turns)}")
    if request.together > 1:
        words = [word for variant in request.variants for word in variant.words]
        said = ServeCommand(["vllm", "serve", "", *request.extra, *words]).flags()
        if ours := [flag for flag in (SPACE_FLAG, SHARE[0], "--port") if flag in said]:
            raise UsageError(f"servers that are loaded together get memory and ports of their own: leave out {ours[0]}")
    limit = context_limit([variant.directory for variant in request.variants])
    if limit is not None and request.context > limit:
        raise UsageError(
            f"sequences of up to {request.context} tokens are asked for, and the model takes {limit}: "
            "ask for a smaller --input, --output, --prefill or --long"
        )


def _jobs(found: Measured) -> list[Job]:
    """Every run, with the result that is there under its key."""
    request, place, jobs = found.request, found.place, []
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
    def __init__(self, found: Measured, progress: Progress, deadline: float) -> None:
        self.found, self.progress, self.deadline = found, progress, deadline
        self.broken: dict[str, dict[str, Any]] = {}
        self.crowded: dict[str, str] = {}
        """Servers that did not start beside others, and why, or that ended there (""): they are tried alone."""
        self.over = False
        self.lock = Lock()

    def sit(self, jobs: Sequence[Job]) -> None:
        """Do these runs, server by server in their order; a run that ends its server has the others start it again."""
        left = list(jobs)
        while left and not self._late():
            names = list(dict.fromkeys(job.variant.name for job in left))
            for name in [name for name in names if name in self.broken]:
                self._settle([job for job in left if job.variant.name == name], self.broken[name])
            left = [job for job in left if job.variant.name not in self.broken]
            batch = self._batch([name for name in names if name not in self.broken])
            if batch:
                left = self._measure(batch, left)

    def _late(self) -> bool:
        return self.over or time.monotonic() >= self.deadline

    def _batch(self, names: Sequence[str]) -> dict[Lane, list[str]]:
        """The next servers to load at once, by the devices that they share."""
        request, commands = self.found.request, self.found.commands
        if request.together == 1 or not names:
            return {ANYWHERE: list(names[:1])} if names else {}
        alone = names[0] in self.crowded
        able = [name for name in names if (name in self.crowded) == alone]
        directories = {variant.name: variant.directory for variant in request.variants}
        sizes = [taken(commands[name], directories[name]) for name in able]
        them = lanes(request.platform, max(devices(commands[name]) for name in names))
        freest = max(them, key=lambda lane: lane.free)
        them = [lane for lane in them if lane is freest or lane.free >= max(sizes)]  # others' programs fill the rest
        dealt = spread(able, sizes, [lane.free for lane in them], 1 if alone else request.together)
        return {lane: own for lane, own in zip(them, dealt) if own}

    def _measure(self, batch: Mapping[Lane, Sequence[str]], jobs: Sequence[Job]) -> list[Job]:
        """Load the servers of a batch at once, then measure those of a lane one after the other, lanes beside each
        other. Returns the runs that are left."""
        with ExitStack() as stack:
            loaders = {lane: stack.enter_context(Loader(self.found.install)) for lane in batch}
            servers: dict[str, Server] = {}
            stack.callback(_stop, servers)
            self._start(batch, servers)
            them = [job for job in jobs if job.variant.name in servers]
            left = [job for job in jobs if job.variant.name not in servers]
            if not them or self._late():
                return left + them
            names = dict.fromkeys(job.variant.name for job in them)
            self.progress.start(f"measuring {', '.join(names)}", len(them))

            def lane_of(lane: Lane) -> list[Job]:
                undone = []
                for name in batch[lane]:
                    if name in servers:
                        mine = [job for job in them if job.variant.name == name]
                        undone += self._serve(servers[name], loaders[lane], mine, beside=len(batch[lane]) > 1)
                        servers[name].stop()
                return undone

            if len(batch) == 1:
                return left + lane_of(next(iter(batch)))
            with ThreadPoolExecutor(len(batch)) as pool:
                try:
                    return left + [job for undone in pool.map(lane_of, batch) for job in undone]
                except BaseException:
                    self.over = True  # what ends now says nothing
                    _stop(servers)
                    raise

    def _start(self, batch: Mapping[Lane, Sequence[str]], servers: dict[str, Server]) -> None:
        """Begin the servers and wait until each is ready, or has failed: that one is taken out, and why is kept."""
        for lane, names in batch.items():
            for name in names:
                servers[name] = self._server(name, lane, {server.port for server in servers.values()})
                servers[name].begin()
        if len(servers) == 1:
            self._ready(next(iter(servers)), servers, Server.await_ready, alone=True)
            return
        cards = f" on {sum(len(lane.cards) for lane in batch)} GPUs" if len(batch) > 1 else ""
        self.progress.say(f"loading {len(servers)} servers at once{cards}: {', '.join(servers)}")
        self.progress.start("starting vLLM", len(servers))
        alone = {name: len(names) == 1 for names in batch.values() for name in names}
        waiting = list(servers)
        while waiting and not self._late():
            for name in list(waiting):
                if self._ready(name, servers, Server.is_ready, alone=alone[name]):
                    waiting.remove(name)
                    self.progress.advance(1, f"{name}: {'ready' if name in servers else 'failed'}")
            time.sleep(POLL_S)

    def _ready(
        self, name: str, servers: dict[str, Server], ask: Callable[[Server], bool | None], *, alone: bool
    ) -> bool:
        """Whether a server needs no more waiting for. One that failed beside others is tried alone; where it then fails
        in the same words, so do those that failed beside it in them."""
        try:
            return ask(servers[name]) is not False
        except HalfbyteError as error:
            servers.pop(name).stop()
            if self._late():
                return True
            told, cause = str(error).removeprefix("vLLM failed: "), str(error).partition(" (log: ")[0]
            if not alone:
                self.crowded[name] = cause
                return True
            same = [other for other, why in self.crowded.items() if why == cause]  # no neighbour is to blame
            self.broken |= {other: {"status": ended(told), "reason": told} for other in (name, *same)}
            return True

    def _server(self, name: str, lane: Lane, ports: Collection[int]) -> Server:
        """A server on those devices, with a port that is none of those."""
        place = make_directory(self.found.place / name)
        log = place / f"vllm-{len(list(place.glob('vllm-*.log')))}.log"
        env = {**QUIETLY, **on_cards(lane.cards)}
        while True:
            command, install = self.found.commands[name], self.found.install
            limit = max(0.0, min(START_TIMEOUT_S, self.deadline - time.monotonic()))
            server = Server(command, install, log_path=log, timeout=limit, env=env, progress=self.progress)
            if server.port not in ports:
                return server

    def _serve(self, server: Server, loader: Loader, jobs: list[Job], *, beside: bool) -> list[Job]:
        """Do runs until none is left or the server has ended; returns those left. What failed is not repeated, but for
        the run of a server that ended beside others: they may have ended it, so it is tried alone."""
        shared = self.found.request.together > 1
        read = reader(self.found.request.platform.capabilities.accelerator, server.pid)
        warm: set[str] = set()
        with PeakMemory(read) as memory:
            while jobs and not self._late():
                job = jobs[0]
                result = self._run(server, loader, job, warm)
                if self.over:
                    break
                if beside and result["status"] in (OUT_OF_MEMORY, CRASHED):
                    self.crowded[job.variant.name] = ""
                    break
                jobs.pop(0)
                facts = server.facts
                self._keep(
                    job,
                    {
                        **result,
                        "load_seconds": round(server.load_seconds, 2),
                        "peak_device_bytes": None if shared else memory.peak,
                        "weight_gib": facts.weight_gib,
                        "kv_cache_tokens": None if shared else facts.kv_cache_tokens,
                        "kernels": list(facts.kernels),
                    },
                )
                self._advance(f"{job.variant.name}, {job.point}: {result['status']}")
                if result["status"] != "ok":
                    same = [other for other in jobs if other.point == job.point]
                    jobs = [other for other in jobs if other.point != job.point]
                    self._settle(same, {"status": result["status"], "reason": result["reason"]})
                if not server.running:
                    break
        return jobs

    def _advance(self, note: str) -> None:
        with self.lock:
            self.progress.advance(1, note)

    def _run(self, server: Server, loader: Loader, job: Job, warm: set[str]) -> dict[str, Any]:
        """`warm`: the points that the server has seen; what it sees is added."""
        if job.load is not None:
            load = replace(job.load, warmups=0 if job.point in warm else job.load.concurrency)
            warm.add(job.point)
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
