"""What a run measures of its artifact in vLLM beside `served`: speed against BF16, and stability.

The single runs are kept in the run's directory under serving/, so that a killed measurement goes on where it was, and
another concurrency only adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.speed import BASELINE, MODEL, ROOM, BenchRequest, Measured, Variant, context_limit
from halfbyte.evaluate.speed_machine import measured_here
from halfbyte.evaluate.speed_result import bench_result, stability_result
from halfbyte.evaluate.speed_runs import measure
from halfbyte.evaluate.stability import PROMPT_ROOM, Watch
from halfbyte.serving import find_vllm

if TYPE_CHECKING:
    from halfbyte.experiments.measurements import Subject

LOAD_SECONDS = 60.0
"""How long a stability gate keeps the server under load."""
PLACE = "serving"
SHORT, LONG = 128, 512
"""Tokens of a prompt and of an answer where speed is measured, and of a long answer, where there is room."""


def levels(subject: Subject) -> tuple[int, ...]:
    """The concurrencies that gates name, and the run's own; 1 where neither names one."""
    named = {int(word) for family in ("speed", "memory") for word in subject.arguments(family)}
    return tuple(sorted(named | ({subject.concurrency} if subject.concurrency else set()))) or (1,)


def key(subject: Subject) -> Mapping[str, Any]:
    """What a result depends on beside the artifact and its platforms."""
    return {"concurrency": levels(subject), "vllm": subject.vllm, "context": subject.context}


def bench(subject: Subject) -> Mapping[str, Any]:
    """bench.json, on this machine. Where a gate asks for stability, the same servers are observed for that."""
    return bench_result(_measured(subject, any(gate.family == "stability" for gate in subject.gates), True))


def stability(subject: Subject) -> Mapping[str, Any]:
    """stability.json: long generations, and load at the largest concurrency. Speed is left to `bench`."""
    found = stability_result(_measured(subject, True, False))
    if found is None:
        raise HalfbyteError("nothing was observed of the server")
    return found


def sizes(subject: Subject) -> tuple[int, int]:
    """(tokens of a prompt and of an answer, tokens of a long answer) that the model and --context have room for.

    Raises HalfbyteError where there is no room.
    """
    limits = [context_limit([subject.path, subject.artifact]), subject.context]
    room = min((limit for limit in limits if limit), default=LONG + PROMPT_ROOM + ROOM) - ROOM
    short, long = min(SHORT, room // 2), min(LONG, room - PROMPT_ROOM)
    if short < 1 or long < 2:
        raise HalfbyteError(f"sequences of {room + ROOM} tokens leave no room for prompts and answers")
    return short, long


def _measured(subject: Subject, watched: bool, loads: bool) -> Measured:
    here, (short, long) = measured_here(subject.platforms, subject.progress), sizes(subject)
    watch = Watch(max(levels(subject)), LOAD_SECONDS, long) if watched else None
    variants = (Variant(BASELINE, subject.path), Variant(MODEL, subject.artifact))
    request = BenchRequest(variants, here, levels(subject), short, short, watch=watch, loads=loads)
    return measure(request, subject.out / PLACE, find_vllm(subject.vllm), progress=subject.progress)
