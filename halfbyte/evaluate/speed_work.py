"""Does the runs of a bench: servers that start one by one, or several at once, and are measured alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from threading import Lock
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.speed import MODEL, Job, Measured
from halfbyte.evaluate.speed_room import Lane, devices, lanes, spread, taken
from halfbyte.evaluate.stability import observe
from halfbyte.files import make_directory, write_json
from halfbyte.serving import Server
from halfbyte.serving.bench import CRASHED, OUT_OF_MEMORY, QUIETLY, Loader, ended, failure, run_load
from halfbyte.serving.bench_memory import PeakMemory, reader
from halfbyte.serving.cards import on_cards
from halfbyte.serving.process import START_TIMEOUT_S
from halfbyte.types import Progress

ANYWHERE = Lane((), 0)
"""Of a server that has its devices for itself."""
POLL_S = 0.2


class Work:
    """The runs of `found` that are wanted, with what was learnt of its servers. No run begins after `deadline`
    (time.monotonic())."""

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


def _stop(servers: Mapping[str, Server]) -> None:
    """End servers, all at once."""
    them = list(servers.values())
    if them:
        with ThreadPoolExecutor(len(them)) as pool:
            list(pool.map(Server.stop, them))
