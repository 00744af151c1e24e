"""The model card's tables: what was lost on text, on tasks and on long inputs, and what was gained in speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.artifact.markdown import finite, md

RECOVERY: tuple[tuple[str, str, str], ...] = (
    ("ppl_baseline", "Perplexity, BF16", "plain"),
    ("ppl", "Perplexity, 4-bit", "plain"),
    ("ppl_ratio", "Perplexity, change", "ratio"),
    ("kl_mean", "KL divergence from BF16, mean, nats a token", "plain"),
    ("kl_p99", "KL divergence, 99th percentile", "plain"),
    ("top1", "Same most likely next token as BF16", "share"),
    ("flips", "Right or wrong about the text's next token, changed", "share"),
)
MOST_POINTS = 12
"""Rows of a table that has one for each concurrency or length."""


def fidelity(evaluation: Mapping[str, Any] | None) -> list[str]:
    """Perplexity, KL and agreement, and on what they were measured."""
    metrics = (evaluation or {}).get("metrics")
    if not isinstance(metrics, Mapping) or not metrics:
        return ["Not measured."]
    level = finite((evaluation or {}).get("confidence"))
    head = f"| measure | value | {'confidence' if level is None else f'{level:.0%}'} interval |\n|---|---|---|"
    rows = [f"| {label} | {_three(metrics[key], unit)} |" for key, label, unit in RECOVERY if key in metrics]
    source = (evaluation or {}).get("text") or {}
    tokens = finite(source.get("tokens"))
    own = (evaluation or {}).get("self_generated")
    text = "that the base model wrote itself" if own else f"of {md(source.get('source', 'text'))}"
    found = ["\n".join([head, *rows])]
    return found + ([f"Measured on {tokens:,.0f} tokens {text}."] if tokens is not None else [])


def tasks(result: Mapping[str, Any] | None) -> list[str]:
    """Each task's scores and recovery (tasks.json)."""
    rows = []
    for row in _rows(result, "tasks"):
        scores = [_value(row.get(side), "plain") for side in ("baseline", "model")]
        name = f"{md(row.get('name'))}, {md(row.get('metric'))}"
        items = finite(row.get("items"))
        recovery = row.get("recovery")
        rows.append(
            f"| {name} | {'–' if items is None else f'{items:,.0f}'} | {scores[0]} | {scores[1]} | "
            f"{_value(recovery, 'share')} | {_interval(recovery, 'share')} |"
        )
    if not rows:
        return []
    average = ((result or {}).get("average") or {}).get("recovery")
    if average:
        rows.append(f"| average | | | | {_value(average, 'share')} | {_interval(average, 'share')} |")
    head = "| task | items | BF16 | 4-bit | recovery | interval |\n|---|---|---|---|---|---|"
    return ["\n".join([head, *rows])]


def long_context(result: Mapping[str, Any] | None) -> list[str]:
    """Retrieval by length, averaged over tasks and depths, and the drift (long_context.json)."""
    by_length: dict[float, dict[str, list[float]]] = {}
    for row in _rows(result, "retrieval"):
        length, scores = finite(row.get("length")), row.get("scores")
        if length is None or not isinstance(scores, Mapping):
            continue
        for side in ("bf16", "4bit"):
            value = finite((scores.get(side) or {}).get("value"))
            if value is not None:
                by_length.setdefault(length, {}).setdefault(side, []).append(value)
    rows = []
    for length in sorted(by_length)[:MOST_POINTS]:
        means = [_mean(by_length[length].get(side)) for side in ("bf16", "4bit")]
        rows.append(f"| {length:,.0f} | {means[0]} | {means[1]} |")
    found = ["\n".join(["| tokens of context | retrieval, BF16 | 4-bit |\n|---|---|---|", *rows])] if rows else []
    drift = ((result or {}).get("drift") or {}).get("4bit")
    if drift:
        found.append(f"Largest loss of retrieval against BF16: {_value(drift, 'share')} ({_interval(drift, 'share')}).")
    return found


def speed(result: Mapping[str, Any] | None) -> list[str]:
    """Tokens a second by concurrency, and where they were measured (bench.json)."""
    rows = []
    for point in _rows(result, "points")[:MOST_POINTS]:
        concurrency = finite(point.get("concurrency"))
        sides = [point.get(side) or {} for side in ("baseline", "model")]
        figures = [_throughput(side) for side in sides]
        gain = point.get("speedup")
        rows.append(
            f"| {'–' if concurrency is None else f'{concurrency:,.0f}'} | {figures[0]} | {figures[1]} | "
            f"{_value(gain, 'times')} | {_interval(gain, 'times')} |"
        )
    if not rows:
        return []
    head = "| concurrency | BF16, tokens/s | 4-bit, tokens/s | speed-up | interval |\n|---|---|---|---|---|"
    where = [md(x) for x in ((result or {}).get("platform"), (result or {}).get("hardware")) if isinstance(x, str)]
    shape = [finite((result or {}).get(key)) for key in ("input_tokens", "output_tokens")]
    words = f"Measured on {', '.join(where) or 'a machine that is not stated'}"
    words += f", vLLM {md((result or {}).get('vllm'))}" if (result or {}).get("vllm") else ""
    words += "" if None in shape else f", {shape[0]:,.0f} tokens in and {shape[1]:,.0f} out"
    return ["\n".join([head, *rows]), f"{words}."]


def _throughput(side: Mapping[str, Any]) -> str:
    """Tokens a second, or what happened instead."""
    status = side.get("status")
    return _value(side.get("output_tokens_per_second"), "plain") if status == "ok" else md(status or "–")


def _rows(result: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    rows = (result or {}).get(key)
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, Sequence) else []


def _three(measured: Any, unit: str) -> str:
    return f"{_value(measured, unit)} | {_interval(measured, unit)}"


def _value(measured: Any, unit: str) -> str:
    return _show((measured or {}).get("value"), unit) if isinstance(measured, Mapping) else "–"


def _interval(measured: Any, unit: str) -> str:
    if not isinstance(measured, Mapping):
        return "–"
    low, high = (_show(measured.get(key), unit) for key in ("low", "high"))
    return "–" if "–" in (low, high) else f"{low} to {high}"


def _mean(values: Sequence[float] | None) -> str:
    return f"{sum(values) / len(values):.1%}" if values else "–"


def _show(value: Any, unit: str) -> str:
    x = finite(value)
    if x is None:
        return "–"
    forms = {"ratio": lambda: f"{x - 1:+.1%}", "share": lambda: f"{x:.1%}", "times": lambda: f"{x:.2f}×"}
    return forms.get(unit, lambda: f"{x:.4g}")()
