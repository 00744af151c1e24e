"""Geometry of the report's pictures, as numbers and words; the template draws them as SVG and escapes the words."""

from __future__ import annotations

import math
import re
from typing import Any

from halfbyte.report.words import dig, listing, mapping, number, percent, significant, size, text

LINEARS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
STEPS = 9
"""Shades of the heat map."""
CELL, GAP, LABEL, HEAD = 18, 2, 96, 20
"""Heat-map geometry in SVG units: a cell, the gap between two, the room for row names and for block numbers."""
COMPONENTS = {"qkv": "attention", "o": "attention", "gate_up": "mlp", "down": "mlp", "lm_head": "lm_head"}
COMPONENT_NAMES = {
    "attention": "Attention linears",
    "mlp": "MLP linears",
    "lm_head": "lm_head",
    "other": "Embeddings, norms, biases",
}
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


def heat_map(errors: dict[str, float | None]) -> dict[str, Any] | None:
    """Depth × linear cells shaded by error, exempt linears outlined; None when no linear has an error."""
    placed = {(int(m[1]), m[2]): (name, errors[name]) for name in errors if (m := _BLOCK.search(name))}
    values = [value for _, value in placed.values() if value is not None]
    if not values:
        return None
    rows = sorted({leaf for _, leaf in placed}, key=_row_order)
    depth = 1 + max(block for block, _ in placed)
    low, high = min(values), max(values)
    ordered = sorted(placed.items())
    cells = [_cell(block, rows.index(leaf), name, value, low, high) for (block, leaf), (name, value) in ordered]
    middles = [HEAD + row * (CELL + GAP) + CELL / 2 for row in range(len(rows))]
    every = 1 if depth <= 16 else 5 if depth <= 60 else 10
    return {
        "width": LABEL + depth * (CELL + GAP),
        "height": HEAD + len(rows) * (CELL + GAP),
        "cell": CELL,
        "cells": cells,
        "rows": [{"y": y, "label": leaf.rsplit(".", 1)[-1]} for y, leaf in zip(middles, rows)],
        "columns": [{"x": LABEL + b * (CELL + GAP) + CELL / 2, "label": b} for b in range(depth) if b % every == 0],
        "low": percent(low),
        "high": percent(high),
        "exempt": any(value is None for _, value in placed.values()),
        "steps": list(range(STEPS)),
    }


def _row_order(leaf: str) -> tuple[int, str]:
    last = leaf.rsplit(".", 1)[-1]
    return (LINEARS.index(last) if last in LINEARS else len(LINEARS), leaf)


def _cell(block: int, row: int, name: str, value: float | None, low: float, high: float) -> dict[str, Any]:
    share = 0.5 if value is None or high <= low else (value - low) / (high - low)
    step = min(STEPS - 1, int(share * STEPS))
    return {
        "x": LABEL + block * (CELL + GAP),
        "y": HEAD + row * (CELL + GAP),
        "class": "exempt" if value is None else f"h{step}",
        "title": f"{name}: {'BF16, exempt' if value is None else percent(value) + ' output error'}",
    }


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
    at_least = gate.get("name") == "top1"
    points = (value, low, high, limit)
    start = max(0.0, min(points) - 0.6 * (max(points) - min(points)) - 0.01) if at_least else min(0.0, min(points))
    stop = 1.0 if at_least else max(points) * 1.15 + 1e-9
    if not math.isfinite(stop - start) or stop <= start:
        return None

    def place(x: float) -> float:
        return round(100 * (x - start) / (stop - start), 2)

    allowed = (place(limit), 100.0) if at_least else (0.0, place(limit))
    return {
        "allowed_x": allowed[0],
        "allowed_width": round(allowed[1] - allowed[0], 2),
        "low": place(low),
        "width": round(max(0.6, place(high) - place(low)), 2),
        "value": place(value),
        "limit": place(limit),
        "title": f"value {text(significant(value))}, limit {text(gate.get('limit'))}",
    }


def limit_number(limit: Any) -> float | None:
    """The number in a gate's limit as it is spelled: `+5%` is 0.05, `0.1` is 0.1."""
    try:
        spelled = str(limit).strip()
        share = float(spelled.removesuffix("%"))
    except ValueError:
        return None
    return number(share / 100 if spelled.endswith("%") else share)
