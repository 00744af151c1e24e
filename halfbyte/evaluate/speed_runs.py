"""The runs of a bench, and which of them are there already.

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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
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
from halfbyte.evaluate.speed_room import SHARE, SPACE_FLAG, devices
from halfbyte.evaluate.speed_work import Work
from halfbyte.files import locked
from halfbyte.models.checkpoint import read_json
from halfbyte.serving import ServeCommand, VllmInstall
from halfbyte.types import Progress, Quiet

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
        work = Work(found, progress or Quiet(), started + seconds)
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
