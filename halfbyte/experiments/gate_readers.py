"""From result files to what a gate is judged on: a number with its interval, or a yes or no.

A reader gets a gate, one of its parts and the results by file name, and gives a Reading: what was measured, in which
file, or why nothing was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.experiments.gate_kinds import GIB, Gate, Part

Results = Mapping[str, Mapping[str, Any] | None]
"""Result files' contents by their names: eval.json, tasks.json, …; absent or None where there is none."""
GIB_BYTES = 1 << 30
ANSWERED, ABSENT = "ok", "not measured"
FP8 = "fp8"


@dataclass(frozen=True)
class Reading:
    """What was found. `value`, `low`, `high`: the number and its interval; None where it is not measured.

    passed   a yes or no, where there is no number to compare (or one that settles it whatever the number is)
    words    what to say of it: why it is not measured or failed, or what the yes rests on
    bare     the number has no interval: an estimate
    """

    file: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    passed: bool | None = None
    words: str = ""
    bare: bool = False
    confidence: Any = 0.95


def read(gate: Gate, part: Part, results: Results) -> Reading:
    """What the results say of one part of a gate."""
    return READERS[gate.kind.reader](gate, part, results)


def serves_fp8(results: Results) -> bool | None:
    """Whether the plan serves some platform with an FP8 KV cache; None where there is no plan."""
    plan = results.get("plan.json")
    if not plan:
        return None
    return any(str(row.get("kv_cache_dtype", "")).startswith(FP8) for row in plan.get("kv_cache") or [])


def _metric(gate: Gate, tree: Mapping[str, Any], measured: Any, flip: bool = False) -> Reading:
    """A metric {"value", "low", "high"} as a Reading; `flip`: where less is better."""
    found = [measured.get(key) if isinstance(measured, Mapping) else None for key in ("value", "low", "high")]
    numbers = [float(x) - gate.kind.minus for x in found if isinstance(x, (int, float))]
    if len(numbers) < len(found):
        words = "" if found[0] is None else "with a confidence interval"
        return Reading(gate.kind.file, words=words)
    value, low, high = numbers
    if flip:
        value, low, high = -value, -high, -low
    return Reading(gate.kind.file, value, low, high, confidence=tree.get("confidence", 0.95))


def _number(gate: Gate, part: Part, results: Results) -> Reading:
    tree = results.get(gate.kind.file) or {}
    found: Any = tree
    for key in part.value.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return _metric(gate, tree, found)


def _task(gate: Gate, part: Part, results: Results) -> Reading:
    tree = results.get(gate.kind.file) or {}
    rows = [row for row in tree.get("tasks") or [] if row.get("name") == gate.argument]
    if tree and not rows:
        return Reading(gate.kind.file, words=f"it is not among the tasks of {gate.kind.file}")
    return (
        _metric(gate, tree, rows[0].get("difference"), rows[0].get("higher_is_better") is False)
        if rows
        else _none(gate)
    )


def _speed(gate: Gate, part: Part, results: Results) -> Reading:
    tree = results.get(gate.kind.file) or {}
    point = _point(tree, gate.argument)
    if point is None:
        why = f"{gate.kind.file} has no such concurrency" if tree else ""
        return Reading(gate.kind.file, words=why)
    for side, name in (("model", "the 4-bit model"), ("baseline", "BF16")):
        told = point.get(side) or {}
        if told.get("status") != ANSWERED:
            words = f"{name}: {told.get('status', 'not run')}" + (f", {told['reason']}" if told.get("reason") else "")
            failed = side == "model" and told and told.get("status") != ABSENT
            return Reading(gate.kind.file, passed=False if failed else None, words=words)
    return _metric(gate, tree, point.get("speedup"))


def _point(bench: Mapping[str, Any], concurrency: str) -> Mapping[str, Any] | None:
    return next((p for p in bench.get("points") or [] if str(p.get("concurrency")) == concurrency), None)


def _memory(gate: Gate, part: Part, results: Results) -> Reading:
    """The plan's estimate on the platform where it is tightest; what a benchmark showed at that very concurrency
    decides there whether it fits."""
    bench = results.get("bench.json") or {}
    told = (_point(bench, gate.argument) or {}).get("model") or {}
    told = {} if told.get("status") == ABSENT else told
    if told and told.get("status") != ANSWERED:
        return Reading("bench.json", passed=False, words=f"{bench.get('platform')}: {told.get('status')}")
    needs = []
    for row in (results.get(gate.kind.file) or {}).get("memory") or []:
        levels = {str(level["concurrency"]): level for level in [*(row.get("levels") or []), *(row.get("asked") or [])]}
        if gate.argument in levels:
            ran = bool(told) and row.get("platform") == bench.get("platform")
            needs.append((row, levels[gate.argument], True if ran else levels[gate.argument]["fits"]))
    if not needs:
        return _none(gate)
    platform, level, _ = max(needs, key=lambda need: need[1]["total_bytes"])
    gib = level["total_bytes"] / GIB_BYTES
    fits = [fit for _, _, fit in needs]
    words = f"{gib:.4g}{GIB} on {platform['platform']} at a context of {level['context']}, the plan's estimate"
    if not gate.word:
        return Reading(gate.kind.file, gib, gib, gib, words=words, bare=True)
    if None in fits and False not in fits:
        return Reading(gate.kind.file, words="how much memory the device has is not known")
    file = f"{gate.kind.file}, bench.json" if told else gate.kind.file
    return Reading(file, gib, gib, gib, passed=False not in fits, words=words, bare=True)


def _flag(gate: Gate, part: Part, results: Results) -> Reading:
    tree = results.get(gate.kind.file)
    if not tree or not isinstance(tree.get("ok"), bool):
        return _none(gate)
    return Reading(gate.kind.file, passed=tree["ok"], words="; ".join(map(str, tree.get("reasons") or [])))


def _check(gate: Gate, part: Part, results: Results) -> Reading:
    check = results.get(gate.kind.file)
    if check is None:
        return Reading(gate.kind.file, words="not checked")
    findings = check.get("findings") or []
    if check.get("ok"):
        return Reading(gate.kind.file, passed=True, words=f"yes, {check.get('tensors', 0)} tensors checked")
    first = f", first {findings[0].get('where')}: {findings[0].get('message')}" if findings else ""
    words = f"no, {len(findings)} finding{'s' * (len(findings) != 1)}{first}"
    return Reading(gate.kind.file, passed=False, words=words)


def _served(gate: Gate, part: Part, results: Results) -> Reading:
    served = results.get(gate.kind.file)
    reason = f" ({served['reason']})" if served and served.get("reason") else ""
    if served is None or served.get("status") != "served":
        return Reading(gate.kind.file, words=f"not served{reason}")
    difference = served.get("relative_difference")
    apart = "" if difference is None else f", {abs(difference):.2%} apart in perplexity"
    passed = bool(served.get("passed"))
    return Reading(gate.kind.file, passed=passed, words=f"yes{apart}" if passed else f"no{apart}{reason}")


def _none(gate: Gate) -> Reading:
    return Reading(gate.kind.file)


READERS: dict[str, Callable[[Gate, Part, Results], Reading]] = {
    "number": _number,
    "task": _task,
    "speed": _speed,
    "memory": _memory,
    "flag": _flag,
    "check": _check,
    "served": _served,
}


def worst(reading: Reading, at_least: bool) -> float | None:
    """The unfavourable end of the interval; None where there is none. NaN and infinity stay what they are."""
    return reading.low if at_least else reading.high


def finite(x: float | None) -> float | None:
    """A number that JSON can hold, or None."""
    return x if x is not None and math.isfinite(x) else None
