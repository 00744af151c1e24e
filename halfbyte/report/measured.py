"""What was measured, as words: gates, fidelity, the served check, the structural check."""

from __future__ import annotations

from typing import Any

from halfbyte.report import plots
from halfbyte.report.words import (
    MISSING,
    command,
    dig,
    listing,
    mapping,
    number,
    percent,
    plural,
    seconds,
    significant,
    size,
    text,
)

Pairs = list[tuple[str, str]]
STATUSES = {"passed": "passed", "failed": "failed"}
METRICS: tuple[tuple[str, str, str], ...] = (
    ("ppl_baseline", "Perplexity, BF16", ""),
    ("ppl", "Perplexity, 4-bit", ""),
    ("ppl_ratio", "Perplexity, change", "ratio"),
    ("kl_mean", "KL divergence, mean", "nats"),
    ("kl_median", "KL divergence, median", "nats"),
    ("kl_p99", "KL divergence, 99th percentile", "nats"),
    ("kl_p999", "KL divergence, 99.9th percentile", "nats"),
    ("top1", "Same most likely next token", "share"),
    ("loglik_gap", "Log-likelihood lost a token", "nats"),
)


def gate(row: dict[str, Any]) -> dict[str, Any]:
    limit = plots.limit_number(row.get("limit"))
    spelled = text(row.get("limit"))

    def show(value: Any) -> str:
        return percent(value, signed=spelled.startswith("+")) if "%" in spelled else significant(value)

    bounds = [number(row.get(key)) for key in ("low", "high")]
    interval = "–" if None in bounds else f"{show(bounds[0])} to {show(bounds[1])}"
    return {
        "name": text(row.get("name")),
        "limit": spelled,
        "value": show(row.get("value")) if number(row.get("value")) is not None else "–",
        "interval": interval,
        "status": text(row.get("status"), MISSING),
        "class": STATUSES.get(str(row.get("status")), "open"),
        "text": text(row.get("text"), ""),
        "bullet": plots.gate_bullet(row, limit),
    }


def fidelity(evaluation: dict[str, Any]) -> dict[str, Any] | None:
    metrics = mapping(evaluation.get("metrics"))
    if not metrics:
        return None
    floor = mapping(evaluation.get("noise_floor"))
    rows = [_metric(metrics, floor, *metric) for metric in METRICS if metric[0] in metrics]
    return {"rows": rows, "notes": _fidelity_notes(evaluation, floor), "confidence": percent_whole(evaluation)}


def percent_whole(evaluation: dict[str, Any]) -> str:
    """The confidence level of the intervals, as 95%."""
    level = number(evaluation.get("confidence"))
    return f"{level:.0%}" if level is not None else "stated"


def _metric(metrics: dict[str, Any], floor: dict[str, Any], name: str, label: str, unit: str) -> dict[str, str]:
    def show(value: Any) -> str:
        x = number(value)
        if x is None:
            return "–"
        if unit == "ratio":
            return percent(x - 1, signed=True)
        return percent(x) if unit == "share" else significant(x)

    value, low, high = (dig(metrics, name, key) for key in ("value", "low", "high"))
    interval = "–" if number(low) is None or number(high) is None else f"{show(low)} to {show(high)}"
    label += ", nats" if unit == "nats" else ""
    return {"label": label, "value": show(value), "interval": interval, "floor": show(floor.get(name))}


def _fidelity_notes(evaluation: dict[str, Any], floor: dict[str, Any]) -> list[str]:
    source = mapping(evaluation.get("text"))
    tokens, windows, window, stride = (number(source.get(key)) for key in ("tokens", "windows", "window", "stride"))
    notes = []
    if tokens is not None:
        known = None not in (windows, window, stride)
        cut = f", {windows:,.0f} windows of {window:,.0f}, stride {stride:,.0f}" if known else ""
        own = evaluation.get("self_generated")
        of = "that the BF16 model wrote itself" if own else f"of {text(source.get('source'))}"
        notes.append(f"Measured on {tokens:,.0f} tokens {of}{cut}.")
    if evaluation.get("self_generated"):
        notes.append("On a model's own text the log-likelihood lost estimates the KL divergence.")
    if floor:
        how = text(floor.get("how"), "BF16 measured against itself")
        notes.append(f"Noise floor: {how}. A difference no larger than it means nothing.")
    return notes


def served(served: dict[str, Any]) -> dict[str, Any] | None:
    if not served:
        return None
    gib = ("weight_gib_reported", "artifact_gib")
    reported, artifact = (number(served.get(key)) for key in gib)
    rows: Pairs = [
        ("vLLM", text(served.get("vllm"))),
        ("Perplexity, served by vLLM", significant(served.get("ppl_served"))),
        ("Perplexity, the same weights in transformers", significant(served.get("ppl_reference"))),
        ("Apart", f"{percent(served.get('relative_difference'))} (limit {percent(served.get('limit'))})"),
        ("Weights in vLLM's memory", "not reported" if reported is None else size(reported * 2**30)),
        ("Artifact", size(None if artifact is None else artifact * 2**30)),
        ("Loaded in", seconds(served.get("load_seconds"))),
    ]
    return {
        "status": "passed" if served.get("passed") else "open" if served.get("status") != "served" else "failed",
        "word": text(served.get("status"), "not served"),
        "reason": text(served.get("reason"), ""),
        "rows": rows if served.get("status") == "served" else [],
        "completion": text(served.get("completion"), ""),
        "command": command(served.get("command")),
    }


def check(check: dict[str, Any]) -> dict[str, Any] | None:
    if not check:
        return None
    findings = [mapping(finding) for finding in listing(check.get("findings"))]
    amount = f"{text(check.get('tensors'))} tensors, {size(check.get('bytes'))}"
    whole = f"{amount}: names, shapes, dtypes, values and hashes hold."
    return {
        "ok": bool(check.get("ok")),
        "text": whole if check.get("ok") else f"{plural(len(findings), 'finding')}.",
        "findings": [{key: text(finding.get(key)) for key in ("code", "where", "message")} for finding in findings],
    }
