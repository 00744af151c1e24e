"""What `run` measures with bench: bench.json for gates on speed and memory, stability.json for that on stability."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.speed import BASELINE, MODEL, ROOM, BenchRequest, Measured, Variant, measure
from halfbyte.evaluate.speed_result import bench_result, stability_result
from halfbyte.evaluate.stability import PROMPT_ROOM, Watch
from halfbyte.models.checkpoint import read_json
from halfbyte.platforms import Platform
from halfbyte.serving import find_vllm

if TYPE_CHECKING:
    from halfbyte.experiments.measurements import Subject

PLACE = "serving"
"""The directory of runs and logs, in the run's."""
LEVELS = {True: (1, 16, 64), False: (1, 4)}
"""Concurrencies where neither gates nor the user name one, on a GPU and on a CPU."""
SECONDS = 60.0
"""Load at the largest concurrency, for stability."""


def bench_key(subject: Subject) -> Mapping[str, Any]:
    """The load; what it is put on stands in the run's own key."""
    watch = watch_of(subject)
    return {"concurrency": levels(subject), "watch": asdict(watch) if watch else None}


def bench(subject: Subject) -> dict[str, Any]:
    """bench.json on the platform that this machine is. Raises HalfbyteError where it is none, or has no vLLM."""
    return bench_result(_measured(subject))


def stability(subject: Subject) -> dict[str, Any]:
    """stability.json of the same servers; runs that `bench` has done are not done again."""
    found = stability_result(_measured(subject))
    if found is None:
        raise HalfbyteError("stability is measured where a gate asks for it: --gate stability")
    return found


def levels(subject: Subject) -> list[int]:
    """The concurrencies that the gates name, the user's, and without one the usual ones where --bench asks for them.

    Stability is looked at under the load of the user's concurrency, else of the largest usual one.
    """
    named = {int(word) for family in ("speed", "memory") for word in subject.arguments(family) if word.isdecimal()}
    usual = LEVELS[torch.cuda.is_available()]
    asked = {subject.concurrency} if subject.concurrency else set(usual if "bench" in subject.options else ())
    load = {subject.concurrency or max(usual)} if _wants_stability(subject) else set()
    return sorted(named | asked | load) or [max(usual)]


def watch_of(subject: Subject) -> Watch | None:
    """Where a gate asks for it: long answers as long as the model takes, and load at the largest concurrency."""
    if not _wants_stability(subject):
        return None
    limit = read_json(subject.path / "config.json").get("max_position_embeddings")
    tokens = Watch(1).tokens if limit is None else max(2, min(Watch(1).tokens, limit - PROMPT_ROOM - ROOM))
    return Watch(max(levels(subject)), SECONDS, tokens)


def _wants_stability(subject: Subject) -> bool:
    return any(gate.family == "stability" for gate in subject.gates)


def here(platforms: tuple[Platform, ...]) -> Platform:
    """The first platform that this machine can be. Raises HalfbyteError where none is."""
    gpu = torch.cuda.is_available()
    for platform in platforms:
        if platform.capabilities.accelerator == gpu:
            return platform
    names = ", ".join(platform.name for platform in platforms)
    raise HalfbyteError(f"this machine has {'a' if gpu else 'no'} GPU and is none of {names}: run halfbyte bench there")


def _measured(subject: Subject) -> Measured:
    variants = (Variant(BASELINE, subject.path), Variant(MODEL, subject.artifact))
    request = BenchRequest(variants, here(subject.platforms), tuple(levels(subject)), watch=watch_of(subject))
    return measure(request, subject.out / PLACE, find_vllm(subject.vllm), progress=subject.progress)
