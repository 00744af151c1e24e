"""Geometry of the report's pictures, as numbers and words; the template draws them as SVG and escapes the words."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from halfbyte.report.words import dig, listing, mapping, number, percent, significant, size, text

LINEARS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
AT_LEAST = ("top1",)
"""Gates whose limit is a least value, where nothing else tells."""
STEPS = 9
"""Shades of the heat map."""
ROW = 19
"""Pixels of a heat map's row; its columns share the width."""
GAP = 0.08
"""Share of a cell that is left free between two."""
COMPONENTS = {"qkv": "attention", "o": "attention", "gate_up": "mlp", "down": "mlp", "lm_head": "lm_head"}
COMPONENT_NAMES = {
    "attention": "Attention linears",
    "mlp": "MLP linears",
    "lm_head": "lm_head",
    "other": "Embeddings, norms, biases",
}
Show = Callable[[float], str]
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,5})\.(.+)$")


def errors_by_linear(manifest: dict[str, Any], plan: dict[str, Any]) -> dict[str, float | None]:
    """Relative output error by full linear name; None for a linear that stays in BF16."""
    found: dict[str, float | None] = {}
    for row in listing(plan.get("exemptions")):
        found |= {name: None for name in listing(mapping(row).get("names")) if isinstance(name, str)}
    for name, entry in mapping(manifest.get("linears")).items():
        if mapping(entry).get("scheme") is None:
            found[name] = None
        else:
            error = number(dig(entry, "error", "relative"))
            if error is not None:
                found[name] = error
    return found


def heat_map(
    values: dict[str, float | None], what: str = "output error", show: Show = percent
) -> dict[str, Any] | None:
    """Depth × linear cells shaded by `values`, exempt linears (None) outlined; None when no linear has a value.

    Columns and cells in percent of the width, rows in pixels.
    """
    placed = {(int(m[1]), m[2]): (name, values[name]) for name in values if (m := _BLOCK.search(name))}
    known = [value for _, value in placed.values() if value is not None]
    if not known:
        return None
    rows = sorted({leaf for _, leaf in placed}, key=_row_order)
    depth = 1 + max(block for block, _ in placed)
    low, high = min(known), max(known)
    every = 1 if depth <= 12 else 5 if depth <= 60 else 10
    wide = 100 / depth
    return {
        "height": len(rows) * ROW,
        "row": ROW,
        "width": round(wide * (1 - GAP), 3),
        "cells": [
            {
                "x": round(wide * (block + GAP / 2), 3),
                "y": rows.index(leaf) * ROW,
                **_cell(name, value, low, high, f"{what}: {show(value)}" if value is not None else "BF16, exempt"),
            }
            for (block, leaf), (name, value) in sorted(placed.items())
        ],
        "rows": [{"y": i * ROW + ROW / 2, "label": leaf.rsplit(".", 1)[-1]} for i, leaf in enumerate(rows)],
        "columns": [{"x": round(wide * (b + 0.5), 3), "label": b} for b in range(depth) if b % every == 0],
        "low": show(low),
        "high": show(high),
        "exempt": any(value is None for _, value in placed.values()),
        "steps": list(range(STEPS)),
    }


def _row_order(leaf: str) -> tuple[int, str]:
    last = leaf.rsplit(".", 1)[-1]
    return (LINEARS.index(last) if last in LINEARS else len(LINEARS), leaf)


def _cell(name: str, value: float | None, low: float, high: float, words: str) -> dict[str, str]:
    share = 0.5 if value is None or high <= low else (value - low) / (high - low)
    step = min(STEPS - 1, int(share * STEPS))
    return {"class": "exempt" if value is None else f"h{step}", "title": f"{name}: {words}"}


def sensitivity_by_linear(sensitivity: dict[str, Any]) -> dict[str, float | None]:
    """KL of quantizing a linear's fused group alone, nats a token, by full linear name; None for an exempt linear."""
    found: dict[str, float | None] = {}
    for row in map(mapping, listing(sensitivity.get("exempt"))):
        if isinstance(row.get("name"), str):
            found[row["name"]] = None
    for row in map(mapping, listing(sensitivity.get("groups"))):
        kl = number(row.get("kl"))
        if kl is not None:
            found |= {name: kl for name in listing(row.get("names")) if isinstance(name, str)}
    return found


def worst_linears(errors: dict[str, float | None], count: int = 8) -> list[dict[str, str]]:
    """The linears with the largest error."""
    ranked = sorted(((value, name) for name, value in errors.items() if value is not None), reverse=True)
    return [{"name": name, "error": percent(value)} for value, name in ranked[:count]]


def byte_bars(plan: dict[str, Any]) -> dict[str, Any] | None:
    """Two stacked bars, BF16 and 4-bit, on one scale, with the table beneath; None without the plan's bytes."""
    parts = {name: [0.0, 0.0] for name in COMPONENT_NAMES}
    for row in listing(plan.get("linears")):
        before, after = number(mapping(row).get("bytes_before")), number(mapping(row).get("bytes_after"))
        component = COMPONENTS.get(str(mapping(row).get("kind")))
        if component and before is not None and after is not None:
            parts[component][0] += before
            parts[component][1] += after
    other = number(dig(plan, "bytes", "other_tensors"))
    parts["other"] = [other or 0.0, other or 0.0]
    totals = [sum(part[side] for part in parts.values()) for side in (0, 1)]
    if totals[0] <= 0:
        return None
    return {
        "bars": [_bar(label, side, parts, totals) for side, label in enumerate(("BF16", "4-bit"))],
        "rows": [
            {
                "class": name,
                "label": COMPONENT_NAMES[name],
                "before": size(before),
                "after": size(after),
                "ratio": f"{after / before:.0%}" if before else "–",
            }
            for name, (before, after) in parts.items()
            if before or after
        ],
        "before": size(totals[0]),
        "after": size(totals[1]),
        "ratio": f"{totals[1] / totals[0]:.0%}",
    }


def _bar(label: str, side: int, parts: dict[str, list[float]], totals: list[float]) -> dict[str, Any]:
    segments, x = [], 0.0
    for name, part in parts.items():
        width = 100 * part[side] / max(totals)
        if width > 0:
            title = f"{label}, {COMPONENT_NAMES[name]}: {size(part[side])}"
            segments.append({"x": round(x, 3), "width": round(width, 3), "class": name, "title": title})
            x += width
    return {"label": label, "total": size(totals[side]), "segments": segments}


def gate_bullet(gate: dict[str, Any], limit: float | None) -> dict[str, Any] | None:
    """A gate's interval beside its limit, in percent of the picture's width; None without numbers."""
    value, low, high = (number(gate.get(key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None or limit is None:
        return None
    points, least = (value, low, high, limit), is_least(gate, limit)
    share = least and max(points) <= 1
    reach = max(points) - min(points)
    start = max(0.0, min(points) - 0.6 * reach - 0.01) if share else min(0.0, min(points))
    stop = 1.0 if share else max(points) + 0.15 * max(abs(max(points)), reach) + 1e-9
    if not math.isfinite(stop - start) or stop <= start:
        return None

    def place(x: float) -> float:
        return round(100 * (x - start) / (stop - start), 2)

    allowed = (place(limit), 100.0) if least else (0.0, place(limit))
    return {
        "allowed_x": allowed[0],
        "allowed_width": round(allowed[1] - allowed[0], 2),
        "low": place(low),
        "width": round(max(0.6, place(high) - place(low)), 2),
        "value": place(value),
        "limit": place(limit),
        "title": f"value {text(significant(value))}, limit {text(gate.get('limit'))}",
    }


def is_least(gate: dict[str, Any], limit: float) -> bool:
    """Whether the limit is a least value (agreement, speed-up) and not a most one.

    The judgement tells: one that passed lies on the allowed side, one that failed has an end on the other. Where that
    leaves it open, the words do.
    """
    low, high = number(gate.get("low")), number(gate.get("high"))
    if low is not None and high is not None and low != high:
        below, above = high <= limit, low >= limit
        if gate.get("status") == "passed" and below != above:
            return above
        if gate.get("status") == "failed" and (low > limit or high < limit):
            return below
    return "at least" in str(gate.get("text")) or str(gate.get("name")) in AT_LEAST


def difference_bullet(value: Any, low: Any, high: Any, reach: float) -> dict[str, Any] | None:
    """A difference's interval beside zero, in percent of a picture that goes from -reach to reach."""
    numbers = [number(x) for x in (value, low, high)]
    if None in numbers or reach <= 0:
        return None
    at, left, right = (round(50 + 50 * max(-1.0, min(1.0, x / reach)), 2) for x in numbers if x is not None)
    title = f"{significant(value)} ({significant(low)} to {significant(high)})"
    return {"low": left, "width": round(max(0.6, right - left), 2), "value": at, "limit": 50.0, "title": title}


def limit_number(limit: Any) -> float | None:
    """The number in a gate's limit as it is spelled: `+5%` is 0.05, `0.1` is 0.1, `40GiB` is 40."""
    try:
        spelled = str(limit).strip()
        share = float(spelled.removesuffix("%").removesuffix("GiB"))
    except ValueError:
        return None
    return number(share / 100 if spelled.endswith("%") else share)
