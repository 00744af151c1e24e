"""Gates: the quality budget as data (gates.yaml), judged on the unfavourable end of each confidence interval.

A gate passes when even the worst end of the interval keeps the limit, so that luck cannot pass it; what was
not measured never passes. A gate that the user states is required; so is one that holds by default and whose
measurement was asked for. A default gate that nothing was measured for does not block, but the verdict names it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from halfbyte.experiments.gate_kinds import Gate, Part, default_gates, kinds, parse_gate, spell
from halfbyte.experiments.gate_readers import Reading, Results, finite, read, serves_fp8, worst

__all__ = ["DEFAULT_GATES", "Gate", "evaluate_gates", "parse_gate", "resolve_gates", "shortfall", "verdict_text"]

DEFAULT_GATES = default_gates()
ALWAYS = ("eval.json",)
"""What every run measures."""
BROKEN = ("check", "served")
"""They reject without being asked."""
VALUES = ("value", "low", "high")
LEAST_LIMIT = 1e-3
"""A limit of 0 counts as this much where shortfalls are compared."""


def resolve_gates(texts: Iterable[str] = (), defaults: Iterable[str] = DEFAULT_GATES) -> list[Gate]:
    """The default gates with the user's in their place (`ppl=+18%` replaces, `top1=off` drops, `kl=0.1` adds).

    A gate at a concurrency (`speed@16=+20%`) takes the place of the default one at another.
    """
    stated = {gate.name: replace(gate, stated=True) for gate in map(parse_gate, texts)}
    given = {gate.family for gate in stated.values()}
    gates = {g.name: g for g in map(parse_gate, defaults) if g.name in stated or g.family not in given}
    return [gate for gate in (gates | stated).values() if not gate.off]


def evaluate_gates(
    gates: Iterable[Gate],
    evaluation: Mapping[str, Any] | None,
    check: Mapping[str, Any] | None = None,
    served: Mapping[str, Any] | None = None,
    *,
    results: Results | None = None,
    asked: Collection[str] = ALWAYS,
    why: Mapping[str, str] | None = None,
    tried: str = "",
) -> dict[str, Any]:
    """gates.json: each gate judged on eval.json (and check.json, served.json where given), and the verdict.

    results   the other result files' contents by file name (tasks.json, bench.json, plan.json, …)
    asked     files whose measurement was asked for: a default gate on one of them is required
    why       by file: why it is not there
    tried     what was done already to mend it, as a sentence: it then stands in the place of advice

    A check or a served score that failed rejects even when no gate asks for it. `accepted`: all that are required
    passed, and there is one; `rejected`: one failed; `incomplete`: none failed, but one that is required was not
    measured (or nothing was).
    """
    gates = list(gates)
    known: dict[str, Any] = {"eval.json": evaluation, "check.json": check, "served.json": served, **(results or {})}
    rows = [row for gate in gates for row in _rows(gate, known, asked, why or {})]
    named = {gate.name for gate in gates}
    for name in BROKEN:
        row = _rows(Gate(name, None), known, (), {})[0]
        if name not in named and row["status"] == "failed":
            rows.append(row)
    failed = [row for row in rows if row["status"] == "failed"]
    missing = [row for row in rows if row["status"] == "not measured" and row["required"]]
    passed = [row for row in rows if row["status"] == "passed"]
    verdict = "rejected" if failed else "accepted" if passed and not missing else "incomplete"
    result = {"schema": 1, "kind": "gates", "verdict": verdict, "gates": rows}
    return {**result, "text": verdict_text(result, check, served, tried)}


def _rows(gate: Gate, results: Results, asked: Collection[str], why: Mapping[str, str]) -> list[dict[str, Any]]:
    """A gate's rows: one, or one for each of its parts that is served."""
    fp8 = serves_fp8(results)
    found = []
    for suffix, part in gate.kind.pieces().items():
        reading = read(gate, part, results)
        if part.kv and (fp8 is False or (fp8 is None and reading.value is None)):
            continue
        row = _row(gate, part, reading, why.get(gate.kind.file, ""))
        required = gate.stated or row["status"] != "not measured" or gate.kind.file in asked
        found.append({**row, "name": f"{gate.name}:{suffix}" if suffix else gate.name, "required": required})
    return found


def _row(gate: Gate, part: Part, reading: Reading, why: str) -> dict[str, Any]:
    kind, label = gate.kind, part.label.replace("{arg}", gate.argument)
    status, told = _judge(gate, reading, why)
    numbers = (reading.value, reading.low, reading.high) if status != "not measured" else (None, None, None)
    row = {"name": gate.name, "limit": gate.spell(), **dict(zip(VALUES, map(finite, numbers)))}
    row |= {"status": status, "margin": _margin(gate, reading), "text": f"{label}: {told}"}
    return {**row, "measured_in": reading.file, "source": kind.source}


def _judge(gate: Gate, reading: Reading, why: str) -> tuple[str, str]:
    """(status, what to say behind the gate's label)."""
    kind, limit = gate.kind, f"the limit is {gate.kind.keep} {gate.spell()}"
    bound = worst(reading, kind.keep == "at least")
    if reading.passed is not None:
        said = reading.words or ("yes" if reading.passed else "no")
        return "passed" if reading.passed else "failed", said
    if gate.limit is None or reading.value is None or bound is None:
        return "not measured", _absent(gate, reading, why)
    passed = bound >= gate.limit if kind.keep == "at least" else bound <= gate.limit
    status = "passed" if passed else "failed"
    if reading.bare:
        return status, f"{reading.words}; {limit}"
    value, bad = spell(kind, reading.value), spell(kind, bound)
    return status, f"{value}, at worst {bad} ({_confidence(reading.confidence)} confidence); {limit}"


def _margin(gate: Gate, reading: Reading) -> float | None:
    """What is left between the worse end of the interval and the limit, in the gate's unit; negative beyond it."""
    bound = worst(reading, gate.kind.keep == "at least")
    if gate.limit is None or bound is None:
        return None
    return finite(bound - gate.limit if gate.kind.keep == "at least" else gate.limit - bound)


def shortfall(gates: Iterable[Gate], rows: Iterable[Mapping[str, Any]]) -> float:
    """How far the failed rows are beyond their limits, each as a share of its limit, summed; 0 where none failed."""
    limits = {gate.name: gate.limit for gate in gates}
    total = 0.0
    for row in rows:
        if row["status"] != "failed":
            continue
        limit = limits.get(row["name"], limits.get(row["name"].partition(":")[0]))
        if limit is None or row["margin"] is None:
            return math.inf
        total += -row["margin"] / max(abs(limit), LEAST_LIMIT)
    return total


def _absent(gate: Gate, reading: Reading, why: str) -> str:
    if gate.kind.reader in BROKEN:
        return reading.words
    told = reading.words or why
    return "not measured" + (f" {told}" if told.startswith("with ") else f" ({told})" if told else "")


def verdict_text(
    result: Mapping[str, Any],
    check: Mapping[str, Any] | None = None,
    served: Mapping[str, Any] | None = None,
    tried: str = "",
) -> str:
    """The verdict in words for a reader who has never seen a gate; `check` and `served`: what is known besides."""
    rows = result["gates"]
    open_rows = [row for row in rows if row["status"] == "not measured"]
    if result["verdict"] == "accepted":
        which = "every gate that was measured" if open_rows else "every gate"
        passed = _sentences(row for row in rows if row["status"] == "passed")
        head = f"Accepted: {which} holds even at the worse end of its confidence interval. {passed}"
        return head + (f" {tried}" if tried else "") + _left_open(open_rows)
    if result["verdict"] == "rejected":
        failed = [row for row in rows if row["status"] == "failed"]
        advice = _advice(failed, _soundness(check, served), tried)
        return f"Rejected: {_sentences(failed)} {advice}{_left_open(open_rows)}"
    missing = [row["name"] for row in open_rows if row["required"]]
    what = f"{', '.join(missing)} not measured" if missing else "no gate was measured"
    rest = _left_open([row for row in open_rows if not row["required"]]) if missing else ""
    return f"Incomplete: {what}, and what is not measured does not pass. Nothing measured so far failed.{rest}"


def _sentences(rows: Iterable[Mapping[str, Any]]) -> str:
    return " ".join(f"{row['text'][:1].upper()}{row['text'][1:]}." for row in rows)


def _left_open(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the verdict says nothing of, and how to have it measured."""
    if not rows:
        return ""
    options = dict.fromkeys(o for row in rows if (o := kinds()[_family(row)].option))
    how = f" ({', '.join(options)} of halfbyte run)" if options else ""
    limits = [f"{row['name']} {row['limit']}" for row in rows]
    return f" Not measured in this run, and not judged: {', '.join(limits)}{how}."


def _family(row: Mapping[str, Any]) -> str:
    return str(row["name"]).split("@")[0].split(":")[0]


def _advice(failed: Sequence[Mapping[str, Any]], known: str, tried: str) -> str:
    """What to do: nothing but to make it anew where it is broken, else a sentence for each sort of failure."""
    broken = [row for row in failed if row["name"] in BROKEN]
    told = [kinds()[_family(row)].advice for row in broken or failed]
    lossy = (
        f"{known} loses more than the budget allows: choose a smaller group_size, keep the boundary blocks in BF16, "
    )
    lossy += "calibrate on more text, or state a larger budget with --gate."
    if tried:
        lossy = f"{known} loses more than the budget allows. {tried}"
    return " ".join(dict.fromkeys(advice or lossy for advice in told))


def _soundness(check: Mapping[str, Any] | None, served: Mapping[str, Any] | None) -> str:
    """What is known of an artifact beside its quality, as the beginning of a sentence."""
    if check is None:
        return "The artifact was not checked, and it"
    agrees = served is not None and served.get("status") == "served" and served.get("passed")
    return "The artifact is sound" + (" and vLLM computes what it says" if agrees else "") + ", but it"


def _confidence(level: Any) -> str:
    return f"{level:.0%}" if isinstance(level, (int, float)) and math.isfinite(level) else "stated"
