"""Geometry of a sweep's picture: what each cell loses against what it weighs, and the front that no cell beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.report.words import significant, size

WIDTH, HEIGHT = 720, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 110, 14, 40
"""Room around the field, in SVG units."""
LINE = 12
"""Least distance of two labels that stand side by side."""
COLORS = {"gptq": "attention", "awq": "mlp", "nvfp4": "lm_head", "rtn": "other"}
"""Class of a method's points: the colours that the report's style has."""
TICKS = 5


def pareto_plot(points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Points {"name", "method", "bytes", "kl", "low", "high", "pareto"} as places and words; None without any."""
    if not points:
        return None
    xs, highest = [p["bytes"] for p in points], max(p["high"] for p in points)
    margin = max((max(xs) - min(xs)) * 0.06, max(xs) * 0.005, 1)
    low, high = min(xs) - margin, max(xs) + margin
    top = highest * 1.05 or 1.0

    def x(value: float) -> float:
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM), 1)

    marks = [
        {
            "x": x(place[0]),
            "y": y(place[1]),
            "low": y(group[0]["low"]),
            "high": y(group[0]["high"]),
            "class": COLORS.get(str(group[0]["method"]), "other"),
            "front": any(p["pareto"] for p in group),
            "label": ", ".join(p["name"] for p in group),
            "title": f"{', '.join(p['name'] for p in group)}: KL {significant(place[1], 3)}, {size(place[0])}",
        }
        for place, group in _at_one_place(points).items()
    ]
    _spread(marks)
    front = sorted({(m["x"], m["y"]) for m in marks if m["front"]})
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "marks": marks,
        "front": " ".join(f"{a},{b}" for a, b in front) if len(front) > 1 else "",
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
        "top": TOP,
        "columns": [{"x": x(v), "label": size(v)} for v in _ticks(low + margin, high - margin)],
        "rows": [{"y": y(v), "label": significant(v, 2)} for v in _ticks(0.0, top)],
        "methods": sorted({(str(p["method"]).upper(), COLORS.get(str(p["method"]), "other")) for p in points}),
    }


def _at_one_place(points: Sequence[dict[str, Any]]) -> dict[tuple[float, float], list[dict[str, Any]]]:
    found: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for point in points:
        found.setdefault((point["bytes"], point["kl"]), []).append(point)
    return found


def _spread(marks: list[dict[str, Any]]) -> None:
    """Labels to the right of their points, moved down where they would lie on one another."""
    placed: list[dict[str, Any]] = []
    for mark in sorted(marks, key=lambda m: m["y"]):
        mark["label_y"] = mark["y"] + 4
        for other in sorted(placed, key=lambda m: m["label_y"]):
            near = abs(other["x"] - mark["x"]) < 7 * len(max(mark["label"], other["label"], key=len))
            if near and abs(other["label_y"] - mark["label_y"]) < LINE:
                mark["label_y"] = round(other["label_y"] + LINE, 1)
        placed.append(mark)


def _ticks(low: float, high: float) -> list[float]:
    if high <= low:
        return [low]
    return [low + (high - low) * i / (TICKS - 1) for i in range(TICKS)]
