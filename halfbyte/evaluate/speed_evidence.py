"""What a bench measured as an evidence file, which `plan` and `serve` read (halfbyte.platforms.speed.SpeedTable)."""

from __future__ import annotations

import datetime
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from halfbyte.artifact.manifest import read_manifest
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.served import format_of
from halfbyte.evaluate.speed import BASELINE, MODEL, PREFILL, BenchRequest, Measured, Variant, command_for
from halfbyte.evaluate.speed_result import GIB, RATE, summary
from halfbyte.evaluate.speed_room import SPACE_FLAG
from halfbyte.evaluate.speed_stats import unsure
from halfbyte.files import make_directory, refused, write_json
from halfbyte.models import Checkpoint
from halfbyte.platforms import Platform, SpeedTable
from halfbyte.platforms.base import KV_FLAG
from halfbyte.platforms.evidence import problems, read_table
from halfbyte.serving import ServeCommand, VllmInstall, declared_variant
from halfbyte.serving.bench import NO_REUSE, OK
from halfbyte.types import NVFP4_BLOCK

SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "blocks": "num_hidden_layers",
    "vocab_size": "vocab_size",
}
"""Of the measured model, by their names in config.json."""
LOUD = 0.5
"""Noise from which a concurrency says nothing of kernels."""
SERVERS = "--api-server-count"
"""A flag that makes BF16 as much faster as 4 bits."""
OURS = ("--max-num-seqs", "--max-model-len", "--tensor-parallel-size", "--host", "--port")
"""Flags that a command gets from what is asked of it."""
METHODS = ("gptq", "awq")
"""Formats that are named for how their weights are made."""


def evidence(found: Measured, result: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the table, what was left out of it and why).

    A level is taken where BF16 and every configuration that ran at all were measured (of a bench that was stopped,
    every one that was done); `seconds` are those that
    `concurrency` sequences take at the measured rate. Raises HalfbyteError where there is nothing to compare.
    """
    request = found.request
    named = {variant.name: variant for variant in request.variants}
    if BASELINE not in named or MODEL not in named or format_of(named[MODEL].directory) is None:
        raise HalfbyteError("evidence compares a 4-bit artifact with BF16: bench with --baseline MODEL")
    rates = {v.name: _rates(found, v.name) for v in request.variants}
    left_out = [f"{name}: no point was measured" for name, rate in rates.items() if not rate]
    ran = {name: rate for name, rate in rates.items() if rate}
    for name, why in _unlike(found).items():
        left_out += [f"{name}: {why}"] if ran.pop(name, None) else []
    if found.stopped:
        short = [name for name, rate in ran.items() if set(ran.get(BASELINE, {})) - set(rate)]
        left_out += [f"{name}: not measured at every concurrency" for name in short]
        ran = {name: rate for name, rate in ran.items() if name not in short}
    levels = [level for level in request.concurrency if all(level in rate for rate in ran.values())]
    left_out += [f"concurrency {n}: not measured for all" for n in request.concurrency if n not in levels]
    if BASELINE not in ran or len(ran) < 2 or not levels:
        raise HalfbyteError("no evidence: BF16 and 4 bits were not both measured at any concurrency (see bench.json)")
    variants = [variant for variant in request.variants if variant.name in ran]
    base = next(variant for variant in variants if variant.name == BASELINE)
    rows = [_row(found, result, variant, levels, ran[variant.name]) for variant in variants]
    table: dict[str, Any] = {
        "schema": 1,
        "kind": "speed",
        "measured": True,
        "hardware": found.hardware,
        "date": datetime.date.today().isoformat(),
        **_work(found, _model(base, str(result["baseline"]))),
        "note": f"vllm bench serve, median of {request.repeats}",
        "apart": {
            str(level): max(unsure([run[RATE] for run in found.runs(name, f"c{level}")]) for name in ran)
            for level in levels
        },
        "rows": _told_apart(rows, variants),
    }
    if request.prefill:
        table["prefill"] = {"prompts": request.points[PREFILL].requests, "tokens": request.prefill}
    loud = [level for level, noise in table["apart"].items() if noise > LOUD]
    if loud:
        at = ", ".join(loud)
        left_out.append(f"what tells kernels apart at concurrency {at}, for repeats lie too far apart (more --repeats)")
    try:
        SpeedTable.model_validate(table)
    except ValidationError as error:
        raise HalfbyteError(f"no evidence: {problems(error)}") from None
    return table, left_out


def _work(found: Measured, model: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured on what, as a table states it: two that differ in it are two measurements."""
    request, command = found.request, found.commands[BASELINE]
    return {
        "device": request.platform.name,
        "vllm": found.install.version,
        "model": model,
        "dtype": command.value("--dtype") or "bfloat16",
        "tensor_parallel": command.tensor_parallel,
        "prompt_tokens": request.input_tokens,
        "output_tokens": request.output_tokens,
    }


def _unlike(found: Measured) -> dict[str, str]:
    """Configurations that no table with the others holds, and why: of another model, or BF16 as it is there already."""
    named = {variant.name: variant for variant in found.request.variants}
    shape, unlike = _shape(named[BASELINE]), {}
    seen = {_kv_cache(found.commands[BASELINE])}
    for name, variant in named.items():
        cache = _kv_cache(found.commands[name])
        flags = extra_flags(found.commands[name], plain_command(found, variant))
        if _shape(variant) != shape:
            unlike[name] = "another model than the BF16 one"
        elif ours := [flag for flag in flags if flag in OURS]:
            unlike[name] = f"{ours[0]} is said by plan and serve themselves"
        elif SERVERS in flags:
            unlike[name] = f"{SERVERS} is no kernel's, and serves BF16 as well: bench both with it, after --"
        elif name != BASELINE and format_of(variant.directory) is None and not flags:
            if cache in seen:
                unlike[name] = f"BF16 with the KV cache {cache} is there already"
            seen.add(cache)
    return unlike


def _shape(variant: Variant) -> list[Any]:
    config = Checkpoint(variant.directory).config
    return [config.get(key) for key in (*SIZES.values(), "num_attention_heads")]


def refuse_evidence(path: Path, directory: Path, alone: bool) -> None:
    """Say before anything is measured what would leave no evidence file. Raises UsageError, HalfbyteError."""
    if alone or format_of(directory) is None:
        what = "leave out --alone" if alone else f"{directory} is no 4-bit artifact"
        raise UsageError(f"--evidence compares a 4-bit artifact with BF16: {what}")
    try:
        with tempfile.TemporaryFile(dir=make_directory(path.parent)):
            pass
    except OSError as error:
        raise refused(path, error) from error


def refuse_others(path: Path, request: BenchRequest, install: VllmInstall) -> None:
    """Say before anything is measured that the file holds another measurement than this one will be, more than it, or
    that it is no evidence. Raises UsageError."""
    commands = {variant.name: command_for(request, variant, install) for variant in request.variants}
    found = Measured(request, install, commands, [], "", path)
    base = next(variant for variant in request.variants if variant.name == BASELINE)
    unlike = _unlike(found)
    rows = [_kind(found, variant) for variant in request.variants if variant.name not in unlike]
    work = _work(found, _model(base, ""))
    if told := _others(path, work) or _lost(path, rows, request.concurrency):
        raise UsageError(told)


def write_evidence(path: Path, found: Measured, result: Mapping[str, Any]) -> list[str]:
    """Write the evidence file (JSON); returns what was left out of it. A bench that was stopped does not replace a file
    of more rows or concurrencies; no bench replaces another measurement, a part of one, or what is no evidence:
    HalfbyteError."""
    table, left_out = evidence(found, result)
    make_directory(path.parent)
    if told := _others(path, table):
        raise HalfbyteError(told)
    lost = _lost(path, table["rows"], [int(level) for level in table["apart"]])
    if found.stopped and (lost or (path.is_file() and len(read_table(path).rows) > len(table["rows"]))):
        return [*left_out, "it holds more than was measured until now, and is kept as it was"]
    if lost:
        raise HalfbyteError(lost)
    write_json(path, table)
    return left_out


def _others(path: Path, table: Mapping[str, Any]) -> str:
    """What to say where a file holds another measurement than that table's, or something else; else empty. What a file
    does not state is taken for the same."""
    if not path.is_file():
        return ""
    try:
        there = read_table(path)
    except UsageError:
        return f"{path} is there, and is no evidence: name another file"
    told = there.model_dump(mode="json")
    model = {key: table["model"][key] for key in ("parameters", *SIZES)}
    alike = {key: told["model"][key] in (None, value) for key, value in model.items()}
    alike["device"] = told["device"].casefold() == str(table["device"]).casefold()
    alike["vLLM"] = there.covers(str(table["vllm"]))
    for key in ("dtype", "tensor_parallel", "prompt_tokens", "output_tokens"):
        alike[key] = told[key] == table[key]
    if all(alike.values()):
        return ""
    other = " and ".join(key for key, same in alike.items() if not same)
    what = f"{there.model.name}, on {there.device}, vLLM {there.vllm}: another {other}"
    return f"evidence {path} holds another measurement ({what}), which is kept: name another file"


def _lost(path: Path, rows: Sequence[Mapping[str, Any]], levels: Sequence[int]) -> str:
    """What to say where a file holds kernels or concurrencies that such rows do not replace; else empty."""
    if not path.is_file():
        return ""
    there, ours = read_table(path), {_told(row) for row in rows}
    lost = dict.fromkeys(name for row in there.rows if (name := _told(row.model_dump(mode="json"))) not in ours)
    lost |= dict.fromkeys(f"concurrency {level}" for level in there.baseline.seconds if level not in levels)
    if not lost:
        return ""
    what = f"evidence {path} holds {'; '.join(lost)} too, which would be lost"
    return f"{what}: measure that again (--config, --concurrency) or name another file"


def _told(row: Mapping[str, Any]) -> str:
    """What a row is of, in words."""
    words = [*row["variants"], *(f"{flag} {value}" for flag, value in row["flags"].items())]
    return f"{row['format']} ({', '.join([*words, 'KV cache ' + row['kv_cache']])})"


def _kind(found: Measured, variant: Variant) -> dict[str, Any]:
    """What a variant's row says of it before it is measured."""
    command, declared = found.commands[variant.name], declared_variant(variant.directory)
    return {
        "format": format_of(variant.directory) or "bf16",
        "variants": [declared] if declared else [],
        "flags": {} if variant.name == BASELINE else extra_flags(command, plain_command(found, variant)),
        "kv_cache": _kv_cache(command),
    }


def _kv_cache(command: ServeCommand) -> str:
    return command.value(KV_FLAG) or "auto"


def extra_flags(command: ServeCommand, plain: ServeCommand) -> dict[str, str | None]:
    """The flags by which a command differs from what vLLM would do by itself: what makes it take that kernel. The KV
    cache does not, nor a kernel that is left to vLLM ("auto")."""
    theirs, not_a_kernels = plain.flags(), (*NO_REUSE, KV_FLAG, SPACE_FLAG)
    return {
        flag: value
        for flag, value in command.flags().items()
        if theirs.get(flag, "") != value and flag not in not_a_kernels and value != "auto"
    }


def plain_command(found: Measured, variant: Variant) -> ServeCommand:
    """A configuration's command without its own words or any evidence: what vLLM does by itself."""
    platform = found.request.platform.model_copy(update={"speed": ()})
    return command_for(replace(found.request, platform=platform), replace(variant, words=()), found.install)


def _rates(found: Measured, variant: str) -> dict[int, float]:
    """Output tokens a second by concurrency, where measured."""
    rates = {}
    for level in found.request.concurrency:
        point = summary(found.runs(variant, f"c{level}"), found.request.repeats)
        if point["status"] == OK:
            rates[level] = point[RATE]["value"]
    return rates


def _row(
    found: Measured, result: Mapping[str, Any], variant: Variant, levels: list[int], rates: Mapping[int, float]
) -> dict[str, Any]:
    request, name = found.request, variant.name
    kind = _kind(found, variant)
    form, declared = kind["format"], next(iter(kind["variants"]), None)
    bf16 = form == "bf16"
    kernel = "BF16" if bf16 else kernel_name(request.platform, form, declared, result["kernels"][name])
    recipe = {} if bf16 else _recipe(variant.directory, form, declared)
    row: dict[str, Any] = {
        "kernel": kernel,
        "method": "bf16" if bf16 else str(recipe.get("method", "")),
        "group_size": recipe.get("group_size"),
        **kind,
        "weights_gib": round(result["memory"][name]["weight_bytes"] / GIB, 6),
        "seconds": {str(level): level * request.output_tokens / rates[level] for level in levels},
    }
    whole = summary(found.runs(name, PREFILL), request.repeats) if request.prefill else None
    if whole and whole["status"] == OK:
        row["prefill"] = request.points[PREFILL].requests / whole["requests_per_second"]["value"]
    return row


def _told_apart(rows: list[dict[str, Any]], variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """The rows; those of one kernel, method and KV cache with the names of their configurations."""

    def what(row: Mapping[str, Any]) -> list[Any]:
        return [row[key] for key in ("kernel", "method", "format", "variants", "group_size", "kv_cache")]

    alike = [[what(other) for other in rows].count(what(row)) > 1 for row in rows]
    for row, variant, many in zip(rows, variants, alike):
        if many and variant.name not in (BASELINE, MODEL):
            row["kernel"] += f" ({variant.name})"
    return rows


def kernel_name(platform: Platform, form: str, declared: str | None, logged: list[str]) -> str:
    """The kernel that vLLM's log names, in the platform's own word for it where it has one."""
    known = [kernel.name for kernel in platform.support(form, declared).kernels]
    for name in known:
        if any(name.replace(" ", "").casefold() in word.casefold() for word in logged):
            return name
    return logged[0] if logged else "vLLM's own choice"


def _model(base: Variant, name: str) -> dict[str, Any]:
    checkpoint = Checkpoint(base.directory)
    config = checkpoint.config
    return {
        "name": name,
        "parameters": sum(math.prod(info.shape) for info in checkpoint.tensors.values()),
        **{ours: config.get(theirs) for ours, theirs in SIZES.items()},
    }


def _recipe(directory: Path, form: str, declared: str | None) -> Mapping[str, Any]:
    """{method, group_size} of an artifact: by its manifest, else (it is not ours) by what its format says."""
    try:
        return dict(read_manifest(directory)["recipe"])
    except HalfbyteError:
        config = Checkpoint(directory).config.get("quantization_config", {})
    if "nvfp4" in str(declared).casefold():
        return {"method": "nvfp4", "group_size": NVFP4_BLOCK}
    return {"method": form if form in METHODS else "", "group_size": config.get("group_size")}
