"""The facts that halfbyte knows of a vLLM release, compared with what an installed vLLM says of itself.

ask.py is run by the Python of vLLM's environment and asks its own code; here its answers meet platforms/vllm.yaml and
the flags of every platform. A fact holds, differs, or cannot be asked (of this release, or without a GPU or a run).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.platforms import VllmFacts, facts_for, list_platforms, load_platform
from halfbyte.serving.ask import MARK
from halfbyte.serving.install import VllmInstall

ASK = Path(__file__).with_name("ask.py")
TIMEOUT_S = 300.0
HOLDS, DIFFERS, UNKNOWN = "holds", "differs", "cannot be asked"
Row = dict[str, Any]


def verify(install: VllmInstall) -> dict[str, Any]:
    """Every fact of this release: {"schema", "kind": "vllm-facts", "vllm", "executable", "ok" (none differs), "facts":
    [{"fact", "known", "found", "verdict", "why"}]}. Raises HalfbyteError where vLLM cannot be asked at all."""
    facts = facts_for(install.version)
    flags = sorted({(flag, value) for _, flag, value in _emitted()}, key=str)
    found = _ask(install, facts, flags)
    rows = [*_choices(facts, found), *_formats(facts, found), *_numbers(facts, found), *_command(facts, found, flags)]
    rows += [_row(f"quirk {quirk.id}", quirk.text, None, UNKNOWN, "only a run shows it") for quirk in facts.quirks]
    ok = all(row["verdict"] != DIFFERS for row in rows)
    head = {"schema": 1, "kind": "vllm-facts", "vllm": install.version, "executable": install.executable.name}
    return {**head, "ok": ok, "notice": facts.notice, "facts": rows}


def standing(version: str) -> str:
    """How well a vLLM of that version is known: read or measured, between what was, or outside it all."""
    facts = facts_for(version)
    plain = version.partition("+")[0]
    how = "; verify with `halfbyte env --verify`"
    if facts.notice:
        return f"untested: {facts.notice}{how}"
    if plain in facts.seen:
        return f"{plain} was seen ({facts.seen[plain]})"
    seen = ", ".join(f"{v} ({told})" for v, told in facts.seen.items())
    return f"untested: {plain} lies in the range {facts.since} to before {facts.before}, of which {seen} was seen{how}"


def _emitted() -> Iterable[tuple[str, str, str | None]]:
    """(platform, flag, value) of every flag that a serve command of ours may carry."""
    for name in list_platforms():
        platform = load_platform(name)
        tables = [platform.flags, *(support.flags for support in platform.formats.values())]
        tables += [row.flags for table in platform.speed for row in table.rows]
        for flags in tables:
            for flag, value in flags.items():
                yield name, flag, value
        for flag, value in (
            ("--max-model-len", "2048"),
            ("--max-num-seqs", "8"),
            ("--host", "127.0.0.1"),
            ("--port", "1"),
        ):
            yield name, flag, value


def _ask(install: VllmInstall, facts: VllmFacts, flags: list[tuple[str, str | None]]) -> dict[str, Any]:
    asked = {
        "methods": sorted({method for known in facts.formats.values() for method in known.methods}),
        "accepted": [*flags, *(_pair(flag, value) for flag, value in facts.misnomers.items())],
        "refused": [spelled.split(" ", 1) for spelled in facts.misnomers],
    }
    command = [str(install.python), str(ASK), json.dumps(asked)]
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd="/", stdin=subprocess.DEVNULL,
            env={**os.environ, **quiet, "PYTHONPATH": ""},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HalfbyteError(
            f"{install.python} cannot be asked ({type(error).__name__}): is the environment whole?"
        ) from error
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise HalfbyteError(f"{install.python} does not answer: {last}")
    found = json.loads(lines[-1].removeprefix(MARK))
    if "value" not in found["vllm"]:
        raise HalfbyteError(f"{install.python} has no vLLM to ask ({found['vllm']['why']}): name another with --vllm")
    return found


def _pair(spelled: str, value: str) -> tuple[str, str]:
    return spelled.partition(" ")[0], value


def _choices(facts: VllmFacts, found: dict[str, Any]) -> Iterable[Row]:
    yield _subset("choices of --dtype", facts.dtypes, found["dtypes"], new=True)
    yield _subset("choices of --kv-cache-dtype", facts.kv_cache_dtypes, found["kv_cache_dtypes"], new=True)


def _formats(facts: VllmFacts, found: dict[str, Any]) -> Iterable[Row]:
    for name, known in facts.formats.items():
        yield _subset(f"{name}: quantization methods", known.methods, found["methods"])
        for method in known.methods:
            answer = _within(found["activations"], method)
            yield _subset(f"{name}: activations of {method}", known.activations, answer)
        if known.variants:
            yield _subset(f"{name}: variants", known.variants, _within(found["variants"], name))
    for kernel, sizes in facts.kernel_group_sizes.items():
        answer = _within(found["kernel_group_sizes"], kernel)
        yield _compare(
            f"group sizes of {kernel}", sorted(sizes), answer, lambda value, known=sizes: sorted(value) == sorted(known)
        )


def _numbers(facts: VllmFacts, found: dict[str, Any]) -> Iterable[Row]:
    yield _compare("torch", facts.torch, found["torch"], lambda value: value.startswith(facts.torch + "."))
    for name in ("gpu_memory_utilization", "step_tokens", "weights_track"):
        known = getattr(facts, name)
        yield _compare(name, known, found[name], lambda value, known=known: value == known)


def _command(facts: VllmFacts, found: dict[str, Any], flags: list[tuple[str, str | None]]) -> Iterable[Row]:
    for flag, value in flags:
        spelled = f"{flag} {value}" if value else flag
        answer = _within(found["accepted"], spelled)
        yield _compare(f"vllm serve takes {spelled}", True, answer, lambda value: value is True)
    for spelled, instead in facts.misnomers.items():
        answer = _within(found["refused"], spelled)
        yield _compare(f"vllm serve refuses {spelled}", True, _negated(answer), lambda value: value is True)
        right = f"{spelled.partition(' ')[0]} {instead}"
        if right not in {f"{f} {v}" for f, v in flags}:
            answer = _within(found["accepted"], right)
            yield _compare(f"vllm serve takes {right}", True, answer, lambda value: value is True)


def _negated(answer: dict[str, Any]) -> dict[str, Any]:
    return {"value": not answer["value"]} if "value" in answer else answer


def _within(answer: dict[str, Any], key: str) -> dict[str, Any]:
    """The answer to one part of a question; the whole's reason where there is none."""
    if "value" not in answer:
        return answer
    return answer["value"].get(key, {"why": "this release has no such thing"})


def _subset(fact: str, known: Iterable[Any], answer: dict[str, Any], new: bool = False) -> Row:
    """All that is known is there; `new`: what else is there stands in `why`."""
    wanted = list(known)
    if "value" not in answer:
        return _row(fact, wanted, None, UNKNOWN, answer["why"])
    lost = [item for item in wanted if item not in answer["value"]]
    more = [item for item in answer["value"] if item not in wanted] if new else []
    why = f"gone: {', '.join(map(str, lost))}" if lost else f"also: {', '.join(map(str, more))}" if more else ""
    return _row(fact, wanted, answer["value"], DIFFERS if lost else HOLDS, why)


def _compare(fact: str, known: Any, answer: dict[str, Any], same: Any) -> Row:
    if "value" not in answer:
        return _row(fact, known, None, UNKNOWN, answer["why"])
    value = answer["value"]
    return _row(fact, known, value, HOLDS, "") if same(value) else _row(fact, known, value, DIFFERS, f"it says {value}")


def _row(fact: str, known: Any, found: Any, verdict: str, why: str) -> Row:
    return {"fact": fact, "known": known, "found": found, "verdict": verdict, "why": why}
