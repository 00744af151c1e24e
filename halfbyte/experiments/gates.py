"""Gates: the quality budget as data, judged on the unfavourable end of each confidence interval.

A gate passes when even the worst end of the interval keeps the limit, so that luck cannot pass it; what was
not measured never passes. Limits and values of `ppl` are fractions of increase (0.05 is +5 %), of `top1`
fractions of tokens, of `kl`, `kl_p99` and `gap` nats a token.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import UsageError

DEFAULT_GATES = ("ppl=+5%", "top1=90%")
"""The strategy's example for perplexity; nine in ten next tokens the same, which 4-bit models of 7B and more reach."""
OFF = ("off", "none")


@dataclass(frozen=True)
class Kind:
    """What a gate's name means. `shift` is taken from the metric: a ratio of 1.05 is an increase of 0.05."""

    metric: str
    label: str
    unit: str
    at_least: bool = False
    shift: float = 0.0
    signed: bool = False


KINDS = {
    "ppl": Kind("ppl_ratio", "perplexity against BF16", "%", shift=1.0, signed=True),
    "top1": Kind("top1", "same most likely next token as BF16", "%", at_least=True),
    "kl": Kind("kl_mean", "mean KL divergence from BF16", "nats"),
    "kl_p99": Kind("kl_p99", "KL divergence of the worst 1 % of tokens", "nats"),
    "gap": Kind("loglik_gap", "log-likelihood lost on text", "nats"),
}
STRUCTURAL = {
    "check": "the files are whole and dequantize right",
    "served": "vLLM loads it and scores as the reference",
}


@dataclass(frozen=True)
class Gate:
    """One limit. `limit` None: a structural gate (check, served), or with `off` a default that is dropped."""

    name: str
    limit: float | None
    off: bool = False

    def spell(self) -> str:
        """The limit as the user writes it: +5%, 90%, 0.1."""
        if self.off:
            return "off"
        return "yes" if self.limit is None else _spell(KINDS[self.name], self.limit)


def parse_gate(text: str) -> Gate:
    """A gate from `ppl=+5%`, `top1=90%`, `kl=0.1`, `served` or `top1=off`. Raises UsageError in one line."""
    name, equals, limit = (part.strip() for part in text.partition("="))
    if name not in KINDS and name not in STRUCTURAL:
        close = difflib.get_close_matches(name, [*KINDS, *STRUCTURAL], n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"use {', '.join([*KINDS, *STRUCTURAL])}"
        raise UsageError(f"--gate {text}: unknown gate {name!r}: {hint}")
    if limit in OFF:
        return Gate(name, None, off=True)
    if name in STRUCTURAL:
        if limit not in ("", "yes"):
            raise UsageError(f"--gate {text}: {name} takes no limit: write --gate {name}, or {name}=off")
        return Gate(name, None)
    return Gate(name, _limit(text, KINDS[name], limit if equals else ""))


def _limit(text: str, kind: Kind, limit: str) -> float:
    percent = limit.endswith("%")
    example = {"ppl_ratio": "ppl=+5%", "top1": "top1=90%"}.get(kind.metric, "kl=0.1")
    try:
        number = float(limit.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        raise UsageError(f"--gate {text}: {limit!r} is no limit: write it as {example}") from None
    is_share = kind.at_least and 0 <= number <= 1
    right_unit = is_share or percent == (kind.unit == "%")
    if not math.isfinite(number) or not right_unit:
        raise UsageError(f"--gate {text}: {limit!r} is no limit for {kind.label}: write it as {example}")
    if kind.at_least and not is_share:
        raise UsageError(f"--gate {text}: agreement lies between 0% and 100%")
    if number < 0:
        raise UsageError(f"--gate {text}: a budget is not negative: write it as {example}")
    return number


def resolve_gates(texts: Iterable[str] = (), defaults: Iterable[str] = DEFAULT_GATES) -> list[Gate]:
    """The default gates with the user's in their place (`ppl=+18%` replaces, `top1=off` drops, `kl=0.1` adds)."""
    gates = {gate.name: gate for gate in map(parse_gate, defaults)}
    gates |= {gate.name: gate for gate in map(parse_gate, texts)}
    return [gate for gate in gates.values() if not gate.off]


def evaluate_gates(
    gates: Iterable[Gate],
    evaluation: Mapping[str, Any] | None,
    check: Mapping[str, Any] | None = None,
    served: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """gates.json: each gate judged on eval.json (and check.json, served.json where given), and the verdict.

    A check or a served score that failed rejects even when no gate asks for it. `accepted`: all passed;
    `rejected`: one failed; `incomplete`: none failed, but one was not measured (or there is none at all).
    """
    gates = list(gates)
    rows = [_judge(gate, evaluation) for gate in gates if gate.name in KINDS]
    asked = {gate.name for gate in gates}
    for name, row in (("check", _check_row(check)), ("served", _served_row(served))):
        if name in asked or row["status"] == "failed":
            rows.append(row)
    failed = [row for row in rows if row["status"] == "failed"]
    passed = [row for row in rows if row["status"] == "passed"]
    verdict = "rejected" if failed else "accepted" if rows and len(passed) == len(rows) else "incomplete"
    result = {"schema": 1, "kind": "gates", "verdict": verdict, "gates": rows}
    return {**result, "text": verdict_text(result, check, served)}


def verdict_text(
    result: Mapping[str, Any], check: Mapping[str, Any] | None = None, served: Mapping[str, Any] | None = None
) -> str:
    """The verdict in words for a reader who has never seen a gate; `check` and `served`: what is known besides."""
    rows = result["gates"]
    if result["verdict"] == "accepted":
        return "Accepted: every gate holds even at the worse end of its confidence interval. " + _sentences(rows)
    if result["verdict"] == "rejected":
        failed = [row for row in rows if row["status"] == "failed"]
        return "Rejected: " + _sentences(failed) + " " + _advice(failed, _soundness(check, served))
    missing = [row["name"] for row in rows if row["status"] == "not measured"]
    what = f"{', '.join(missing)} not measured" if missing else "there is no gate to pass"
    return f"Incomplete: {what}, and what is not measured does not pass. Nothing measured so far failed."


def _sentences(rows: Iterable[Mapping[str, Any]]) -> str:
    return " ".join(f"{row['text'][:1].upper()}{row['text'][1:]}." for row in rows)


def _advice(failed: list[Mapping[str, Any]], known: str) -> str:
    if any(row["name"] in STRUCTURAL for row in failed):
        return "Do not serve this artifact: make it again, and if that repeats, report it."
    return (
        f"{known} loses more than the budget allows: choose a smaller group_size, keep the "
        "boundary blocks in BF16, calibrate on more text, or state a larger budget with --gate."
    )


def _soundness(check: Mapping[str, Any] | None, served: Mapping[str, Any] | None) -> str:
    """What is known of an artifact beside its quality, as the beginning of a sentence."""
    if check is None:
        return "The artifact was not checked, and it"
    agrees = served is not None and served.get("status") == "served" and served.get("passed")
    return "The artifact is sound" + (" and vLLM computes what it says" if agrees else "") + ", but it"


def _judge(gate: Gate, evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    kind = KINDS[gate.name]
    assert gate.limit is not None
    measured = ((evaluation or {}).get("metrics") or {}).get(kind.metric)
    numbers = [measured.get(key) if isinstance(measured, Mapping) else None for key in ("value", "low", "high")]
    bound = numbers[1] if kind.at_least else numbers[2]
    if numbers[0] is None or bound is None:
        text = f"{kind.label}: not measured{'' if numbers[0] is None else ' with a confidence interval'}"
        return _row(gate, (None, None, None), "not measured", text)
    value, low, high = (None if x is None else float(x) - kind.shift for x in numbers)
    worst = float(bound) - kind.shift
    passed = worst >= gate.limit if kind.at_least else worst <= gate.limit
    assert value is not None
    side = "at least" if kind.at_least else "at most"
    text = (
        f"{kind.label}: {_spell(kind, value)}, at worst {_spell(kind, worst)} "
        f"({_confidence(evaluation)} confidence); the limit is {side} {gate.spell()}"
    )
    return _row(gate, (value, low, high), "passed" if passed else "failed", text)


def _row(gate: Gate, numbers: tuple[float | None, ...], status: str, text: str) -> dict[str, Any]:
    value, low, high = (x if x is not None and math.isfinite(x) else None for x in numbers)
    row = {"name": gate.name, "limit": gate.spell(), "value": value, "low": low, "high": high}
    return {**row, "status": status, "text": text}


def _check_row(check: Mapping[str, Any] | None) -> dict[str, Any]:
    if check is None:
        return _structural_row("check", "not measured", "not checked")
    findings = check.get("findings") or []
    if check.get("ok"):
        return _structural_row("check", "passed", f"yes, {check.get('tensors', 0)} tensors checked")
    first = f", first {findings[0].get('where')}: {findings[0].get('message')}" if findings else ""
    return _structural_row("check", "failed", f"no, {len(findings)} finding{'s' * (len(findings) != 1)}{first}")


def _served_row(served: Mapping[str, Any] | None) -> dict[str, Any]:
    reason = f" ({served['reason']})" if served and served.get("reason") else ""
    if served is None or served.get("status") != "served":
        return _structural_row("served", "not measured", f"not served{reason}")
    difference = served.get("relative_difference")
    apart = "" if difference is None else f", {abs(difference):.2%} apart in perplexity"
    if served.get("passed"):
        return _structural_row("served", "passed", f"yes{apart}")
    return _structural_row("served", "failed", f"no{apart}{reason}")


def _structural_row(name: str, status: str, words: str) -> dict[str, Any]:
    return _row(Gate(name, None), (None, None, None), status, f"{STRUCTURAL[name]}: {words}")


def _confidence(evaluation: Mapping[str, Any] | None) -> str:
    level = (evaluation or {}).get("confidence", 0.95)
    return f"{level:.0%}" if isinstance(level, (int, float)) else "stated"


def _spell(kind: Kind, value: float) -> str:
    if kind.unit == "%":
        number = f"{100 * value:{'+' if kind.signed else ''}.2f}".rstrip("0").rstrip(".")
        return f"{number}%"
    return f"{value:.4g}"
