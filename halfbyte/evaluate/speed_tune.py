"""The few flags of vLLM that matter, tried one after the other on this machine: what is surely faster is kept.

Flags and values are the platform's data (`tune`), in its order. Each flag's values are measured beside what was kept so
far; the fastest is kept where the interval of its gain lies above 1. Where none is, the value that the platform's own
measurements speak for stands, unless it is surely slower here. A flag that changes more than speed is measured and
told, never kept by itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.bootstrap import CONFIDENCE
from halfbyte.evaluate.served import format_of
from halfbyte.evaluate.speed import BenchRequest, Measured, Variant, command_for
from halfbyte.evaluate.speed_result import RATE, portable_command, summary
from halfbyte.evaluate.speed_runs import measure
from halfbyte.evaluate.speed_stats import ratio_interval
from halfbyte.files import write_json
from halfbyte.platforms.schema import Knob, Platform
from halfbyte.serving import ServeCommand, VllmInstall, declared_variant, serve_command
from halfbyte.serving.bench import OK
from halfbyte.types import Progress

TUNE = "tune.json"
PLACE = "tune"
"""The directory of the runs, below the output."""
DEFAULT = "default"

Words = tuple[str, ...]


def tune(
    request: BenchRequest,
    directory: Path,
    output: Path,
    install: VllmInstall,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Try the platform's flags for the artifact in `directory` at the request's one concurrency; writes tune.json.

    request   what to measure; its variants are replaced
    tune.json: schema 1, kind "tune", platform, hardware, vllm, model, concurrency, input_tokens, output_tokens,
    repeats; knobs [{flag, note, changes, tried [{value (None: without it), status, reason, output_tokens_per_second,
    ttft_ms, itl_ms, against (gain over what was kept before)}], stands (the value that `serve` gives it in any case),
    kept, known (kept for the platform's measurements)}]; words (the flags kept), gain (over none of them), command,
    text, seconds, confidence.
    Raises HalfbyteError where the artifact is not served even without them.
    """
    (level,) = request.concurrency
    form, declared = format_of(directory), declared_variant(directory)
    kept: Words = ()
    rows, seconds, found = [], 0.0, None
    default = None
    said = ServeCommand(["vllm", "serve", "", *request.extra]).flags()
    knobs = [knob for knob in request.platform.tune if knob.flag not in said]
    mattering = [knob for knob in knobs if knob.matters(form, install.version, declared, level)]
    without = tuple(dict.fromkeys(knob.flag for knob in mattering))
    advised = _advised(request, directory, install, without)
    for knob in (_with_value(knob, advised.get(knob.flag)) for knob in mattering):
        variants = [Variant(_name(words), directory, words, without) for words in _choices(knob, kept)]
        asked = replace(request, variants=tuple(variants), watch=None, prefill=0)
        found = measure(asked, output / PLACE, install, force=force, progress=progress)
        force, seconds = False, seconds + found.seconds
        default = default or _rates(found, DEFAULT)
        row, kept = _judged(knob, found, kept, advised.get(knob.flag))
        rows.append(row)
    if found is None:
        named = f"{form}/{declared}" if declared else form
        raise HalfbyteError(
            f"no flag is known to matter for {named} on {request.platform.name} (vLLM {install.version})"
        )
    final = _rates(found, _name(kept))
    gain = ratio_interval(final, default) if final and default else None
    command = serve_command(
        directory,
        form,
        request.platform,
        vllm_version=install.version,
        concurrency=level,
        extra=(*kept, *request.extra),
        without=without,
    )
    result = {
        "schema": 1,
        "kind": "tune",
        "platform": request.platform.name,
        "hardware": found.hardware,
        "vllm": install.version,
        "model": directory.name,
        "concurrency": level,
        "input_tokens": request.input_tokens,
        "output_tokens": request.output_tokens,
        "repeats": request.repeats,
        "knobs": rows,
        "words": list(kept),
        "gain": gain,
        "command": portable_command(command).shell(),
        "text": _sentence(kept, gain, level, bool(default), any(row["kept"] and not row["known"] for row in rows)),
        "seconds": round(seconds, 2),
        "confidence": CONFIDENCE,
    }
    write_json(output / TUNE, result)
    return result


def served_alike(result: Mapping[str, Any], directory: Path, platform: Platform, install: VllmInstall) -> bool:
    """Whether `halfbyte serve` with the flags that were kept says the result's command: not where the platform's
    measurements speak for a flag that was slower here, or where vLLM was given further words."""
    command = serve_command(
        directory,
        format_of(directory),
        platform,
        vllm_version=install.version,
        concurrency=result["concurrency"],
        extra=result["words"],
    )
    return portable_command(command).flags() == ServeCommand(shlex.split(result["command"])).flags()


def _advised(request: BenchRequest, directory: Path, install: VllmInstall, flags: Words) -> dict[str, str]:
    """The values of `flags` that the platform's own measurements speak for."""
    plain, served = (
        command_for(request, Variant(DEFAULT, directory, without=without), install).flags() for without in (flags, ())
    )
    return {flag: value for flag in flags if (value := served.get(flag)) and value != plain.get(flag)}


def _with_value(knob: Knob, value: str | None) -> Knob:
    """The knob, and that value among those that it tries."""
    return knob if value in (None, *knob.values) else knob.model_copy(update={"values": (*knob.values, value)})


def _choices(knob: Knob, kept: Words) -> list[Words]:
    """The words to measure: those kept so far, and with each value of the flag."""
    return [kept, *((*kept, knob.flag, value) for value in knob.values)]


def _name(words: Words) -> str:
    pairs = [f"{flag.strip('-')}={value}" for flag, value in zip(words[::2], words[1::2])]
    return ",".join(pairs) or DEFAULT


def _rates(found: Measured, name: str) -> list[float]:
    """Tokens a second of every repeat; empty where one failed."""
    runs = found.runs(name, f"c{found.request.concurrency[0]}")
    whole = len(runs) == found.request.repeats and all(run["status"] == OK for run in runs)
    return [run[RATE] for run in runs] if whole else []


def _judged(knob: Knob, found: Measured, kept: Words, advised: str | None) -> tuple[dict[str, Any], Words]:
    """The knob's row, and the words to go on with. Raises HalfbyteError where what was kept is not served at all."""
    before, tried = _rates(found, _name(kept)), []
    best: tuple[float, str] | None = None
    stands = found.commands[_name(kept)].value(knob.flag)
    known = None
    for words in _choices(knob, kept):
        value = None if words == kept else words[-1]
        mine = _rates(found, _name(words))
        gain = ratio_interval(mine, before) if mine and before and value else None
        tried.append({"value": value, **_shown(found, _name(words)), "against": gain})
        if value and gain and gain["low"] > 1 and not knob.changes and (best is None or gain["value"] > best[0]):
            best = (gain["value"], value)
        served = mine and (gain is None or gain["high"] >= 1)
        if value and value == advised and served and not knob.changes and knob.flag not in kept:
            known = value
    if not before and known is None:
        raise HalfbyteError(f"vLLM cannot be measured without {knob.flag}: {tried[0]['status']}: {tried[0]['reason']}")
    chosen = best[1] if best else known
    row = {
        "flag": knob.flag,
        "note": knob.note,
        "changes": knob.changes,
        "tried": tried,
        "stands": stands,
        "kept": chosen,
        "known": bool(chosen and not best),
    }
    return row, (*kept, knob.flag, chosen) if chosen else kept


def _shown(found: Measured, name: str) -> dict[str, Any]:
    level = found.request.concurrency[0]
    whole = summary(found.runs(name, f"c{level}"), found.request.repeats)
    return {key: whole[key] for key in ("status", "reason", RATE, "ttft_ms", "itl_ms")}


def _sentence(kept: Words, gain: Mapping[str, float] | None, level: int, default: bool, sure: bool) -> str:
    flags = " ".join(kept)
    if not default:
        return f"at concurrency {level} vLLM cannot be measured without {flags}"
    if not sure:
        stands = f": {flags} stands by the platform's measurements" if kept else ""
        return f"at concurrency {level} no flag is surely faster here than none{stands}"
    if gain is None:
        return f"at concurrency {level} {flags} is fastest, step by step"
    return (
        f"at concurrency {level} {flags} is {gain['value']:.2f}x as fast as without "
        f"(95 % interval {gain['low']:.2f} to {gain['high']:.2f})"
    )
