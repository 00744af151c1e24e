"""bench.json and stability.json from the runs of a bench: medians with intervals, gains over BF16, plain sentences."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.artifact import work_of
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.bootstrap import CONFIDENCE
from halfbyte.evaluate.served import format_of
from halfbyte.evaluate.speed import BASELINE, MODEL, PREFILL, STABILITY, BenchRequest, Measured, Variant
from halfbyte.evaluate.speed_stats import median_interval, ratio_interval
from halfbyte.evaluate.stability import judge
from halfbyte.files import portable, write_json
from halfbyte.models.checkpoint import read_json
from halfbyte.serving import ServeCommand
from halfbyte.serving.bench import LATENCIES, OK, PERCENTILES

BENCH, STABLE = "bench.json", "stability.json"
RATE = "output_tokens_per_second"
RATES = (RATE, "requests_per_second", "total_tokens_per_second")
ABSENT = "not measured"
BF16, FOUR_BIT = "BF16", "4-bit"
PROMISE = 1.6
"""The strategy's "+60–100 % tokens/s", its lower end."""
GIB = 1 << 30


def bench_result(found: Measured) -> dict[str, Any]:
    """bench.json: every point of every configuration, what it gains over BF16, memory, commands, and what it means."""
    request = found.request
    names = [variant.name for variant in request.variants]
    points = [{"concurrency": level, **_point(found, f"c{level}")} for level in request.concurrency]
    prefill = None
    if request.prefill:
        load = request.points[PREFILL]
        prefill = {"input_tokens": request.prefill, "prompts": load.requests, "concurrency": load.concurrency}
        prefill |= _point(found, PREFILL)
    directories = {variant.name: portable(variant.directory) for variant in request.variants}
    called = _called(request)
    return {
        "schema": 1,
        "kind": "bench",
        "platform": request.platform.name,
        "hardware": found.hardware,
        "vllm": found.install.version,
        "model": directories.get(MODEL),
        "called": called,
        "work": _work(found),
        "baseline": directories.get(BASELINE),
        "input_tokens": request.input_tokens,
        "output_tokens": request.output_tokens,
        "requests": {str(load.concurrency): load.requests for n, load in request.points.items() if n != PREFILL},
        "repeats": request.repeats,
        "turns": request.turns,
        "seed": request.seed,
        "points": points,
        "prefill": prefill,
        "memory": {name: _memory(found, variant) for name, variant in zip(names, request.variants)},
        "kernels": {name: _last(found, name, "kernels") or [] for name in names},
        "configs": {v.name: list(v.words) for v in request.variants if v.name not in (BASELINE, MODEL)},
        "commands": {name: portable_command(found.commands[name]).shell() for name in names},
        "notes": found.notes,
        "stopped": found.stopped,
        "runs_done": sum(job.result is not None for job in found.jobs),
        "text": [*sentences(points, called), *_stopped(found)],
        "seconds": round(found.seconds, 2),
        "confidence": CONFIDENCE,
    }


def stability_result(found: Measured) -> dict[str, Any] | None:
    """stability.json; None where none was asked for, or the bench was stopped before."""
    seen = {name: next(iter(found.runs(name, STABILITY)), None) for name in (BASELINE, MODEL)}
    if found.request.watch is None or (found.stopped and None in (seen[v.name] for v in _watched(found))):
        return None
    return {**judge(seen[MODEL] or {}, seen[BASELINE]), "work": _work(found)}


def _watched(found: Measured) -> list[Variant]:
    return [variant for variant in found.request.variants if variant.name in (BASELINE, MODEL)]


def _work(found: Measured) -> str | None:
    """The work that the model's artifact names, so that the result is not taken for another's."""
    return next((work_of(variant.directory) for variant in found.request.variants if variant.name == MODEL), None)


def write_bench(output: Path, found: Measured) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Write bench.json, and stability.json where it was asked for; returns both. A bench that was stopped does not
    replace a file that tells more."""
    result, stable = bench_result(found), stability_result(found)
    before = _before(output / BENCH)
    if not (found.stopped and before and before.get("runs_done", len(found.jobs)) > result["runs_done"]):
        write_json(output / BENCH, result)
    if stable is not None:
        write_json(output / STABLE, stable)
    return result, stable


def _before(path: Path) -> dict[str, Any]:
    """What is there; {} where nothing is, or nothing that can be read."""
    try:
        return read_json(path) if path.is_file() else {}
    except HalfbyteError:
        return {}


def summary(runs: Sequence[Mapping[str, Any]], repeats: int) -> dict[str, Any]:
    """One configuration at one point: medians over its repeats with intervals; None where a repeat failed."""
    bad = next((run for run in runs if run["status"] != OK), None)
    whole = bad is None and len(runs) == repeats
    empty = dict.fromkeys([f"p{p}" for p in PERCENTILES])
    return {
        "status": OK if whole else bad["status"] if bad else ABSENT,
        "reason": bad["reason"] if bad else "",
        **{rate: median_interval([run[rate] for run in runs]) if whole else None for rate in RATES},
        **{f"{name}_ms": _latency(runs, f"{name}_ms") if whole else dict(empty) for name in LATENCIES},
        "completed": sum(run.get("completed", 0) for run in runs),
        "failed": sum(run.get("failed", 0) for run in runs),
    }


def sentences(points: Sequence[Mapping[str, Any]], model: str = FOUR_BIT) -> list[str]:
    """Where the promise of +60 % holds, where 4 bits are slower, and which configuration is fastest where.

    model   what the artifact is called
    """
    names = sides(model)
    told = [_promise(points)] if any(BASELINE in point for point in points) else []
    slower = [p["concurrency"] for p in points if p.get("speedup") and p["speedup"]["high"] < 1]
    told += [f"slower than BF16 at concurrency {_and(slower)}: what is gained there is memory"] if slower else []
    for point in points:
        named = {MODEL: point.get(MODEL), **point.get("configs", {})}
        ran = {name: entry for name, entry in named.items() if entry and entry["status"] == OK}
        if len(ran) > 1:
            fastest = _fastest({names.get(name, name): entry for name, entry in ran.items()})
            told.append(f"at concurrency {point['concurrency']} {fastest}")
    broke = [(p["concurrency"], name, p[name]) for p in points for name in (BASELINE, MODEL) if name in p]
    told += [
        f"concurrency {level}, {names[name]}: {entry['status']}: {entry['reason']}"
        for level, name, entry in broke
        if entry["status"] not in (OK, ABSENT)
    ]
    return told


def _stopped(found: Measured) -> list[str]:
    done = sum(job.result is not None for job in found.jobs)
    left = f"{found.stopped}: {done} of {len(found.jobs)} runs were done; the same command goes on where it was"
    unseen = stability_result(found) is None and found.request.watch is not None
    return [left + (", stability not looked at" if unseen else "")] if found.stopped else []


def portable_command(command: ServeCommand) -> ServeCommand:
    """The command with the model's directory by its last name."""
    return replace(command, argv=[*command.argv[:2], portable(command.argv[2]), *command.argv[3:]])


def _point(found: Measured, name: str) -> dict[str, Any]:
    """{baseline, model: a summary; speedup; configs {name: a summary with its speedup}} of a point."""
    rate = "total_tokens_per_second" if name == PREFILL else "output_tokens_per_second"
    repeats = found.request.repeats
    runs = {variant.name: found.runs(variant.name, name) for variant in found.request.variants}
    done = {variant: summary(mine, repeats) for variant, mine in runs.items()}

    def gain(variant: str, over: str) -> dict[str, float] | None:
        if not all(done.get(side, {}).get("status") == OK for side in (variant, over)):
            return None
        return ratio_interval([run[rate] for run in runs[variant]], [run[rate] for run in runs[over]])

    entry: dict[str, Any] = {side: done[side] for side in (BASELINE, MODEL) if side in done}
    entry["speedup"] = gain(MODEL, BASELINE)
    more = {v: s for v, s in done.items() if v not in (BASELINE, MODEL)}
    if more:
        entry["configs"] = {
            v: {**s, "speedup": gain(v, BASELINE), "against_model": gain(v, MODEL)} for v, s in more.items()
        }
    return entry


def _latency(runs: Sequence[Mapping[str, Any]], name: str) -> dict[str, float | None]:
    """The median over the repeats of each percentile."""

    def middle(key: str) -> float | None:
        known = [run[name][key] for run in runs if run[name][key] is not None]
        return round(statistics.median(known), 3) if known else None

    return {f"p{p}": middle(f"p{p}") for p in PERCENTILES}


def _memory(found: Measured, variant: Variant) -> dict[str, Any]:
    """weight_bytes: as vLLM's log says, else of the files; peak_device_bytes: of GPUs, on a CPU of vLLM's processes."""
    logged = _last(found, variant.name, "weight_gib")
    files = sum(file.stat().st_size for file in variant.directory.glob("*.safetensors"))
    peaks = [job.result.get("peak_device_bytes") for job in found.jobs if job.variant is variant and job.result]
    return {
        "weight_bytes": files if logged is None else round(logged * GIB),
        "weight_bytes_from": "files" if logged is None else "vLLM's log",
        "kv_cache_tokens": _last(found, variant.name, "kv_cache_tokens"),
        "peak_device_bytes": max((peak for peak in peaks if peak is not None), default=None),
    }


def _last(found: Measured, variant: str, key: str) -> Any:
    known = [job.result.get(key) for job in found.jobs if job.variant.name == variant and job.result]
    return next((value for value in reversed(known) if value is not None), None)


def _promise(points: Sequence[Mapping[str, Any]]) -> str:
    def levels(holds: Callable[[Mapping[str, float]], bool]) -> list[int]:
        return [p["concurrency"] for p in points if p.get("speedup") and holds(p["speedup"])]

    groups = (
        ("holds at concurrency", levels(lambda gain: gain["low"] >= PROMISE)),
        ("does not hold at", levels(lambda gain: gain["high"] < PROMISE)),
        ("cannot be decided from these repeats at", levels(lambda gain: gain["low"] < PROMISE <= gain["high"])),
        ("was not measured at", [p["concurrency"] for p in points if not p.get("speedup")]),
    )
    said = "; ".join(f"{words} {_and(found)}" for words, found in groups if found)
    return f"+60 % tokens/s over BF16 {said}"


def _fastest(ran: Mapping[str, Mapping[str, Any]]) -> str:
    """Which has the highest median, and over which its interval lies."""
    rates = {name: entry[RATE] for name, entry in ran.items()}
    best = max(rates, key=lambda name: float(rates[name]["value"]))
    others = [name for name in rates if name != best]
    near = [name for name in others if rates[name]["high"] >= rates[best]["low"]]
    gains = [
        f"{rates[best]['value'] / rates[name]['value']:.2f}x the speed of {name}" for name in others if name not in near
    ]
    alike = f"not told from {', '.join(near)} by these repeats" if near else ""
    verdict = "is fastest" if gains or not alike else "has the highest median"
    return f"{best} {verdict}: {', '.join([*gains, *([alike] if alike else [])])}"


def sides(model: str) -> dict[str, str]:
    """What the two sides are called, the artifact as said."""
    return {BASELINE: BF16, MODEL: model}


def _called(request: BenchRequest) -> str:
    """What the measured model is called."""
    directories = {variant.name: variant.directory for variant in request.variants}
    if MODEL not in directories or format_of(directories[MODEL]):
        return FOUR_BIT
    return "model" if BASELINE in directories else BF16


def _and(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
