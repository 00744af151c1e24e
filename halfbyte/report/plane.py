"""Points in a plane, with labels that do not lie on one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.report.axes import Axis, axis, nice_ticks
from halfbyte.report.chart import LETTER, Rule, Show, Value, columns, entry, frame, mark_at

LARGE, SMALL = (300, 430), (150, 210)
"""Height and (about) width of a plane with many points, and of one with two at most."""
LOG_FROM = 40
"""A ratio of largest to smallest value from which on an axis is logarithmic."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""
LINE = 13
"""Pixels of a label's line."""
SHIFTS = [0, *(sign * step for step in range(4, 120, 4) for sign in (1, -1))]
"""How far a label is moved down (or up) from its point, in pixels, the least first."""


@dataclass(frozen=True)
class Point:
    """A point in the plane, with the interval of each side; `front`: ringed and joined with its like."""

    name: str
    x: Value
    y: Value
    look: str
    shape: str = "dot"
    front: bool = False
    title: str = ""


def scatter(
    title: str,
    points: Sequence[Point],
    show: tuple[Show, Show],
    *,
    names: tuple[str, str],
    rules: Sequence[Rule] = (),
    legend: Sequence[tuple[str, str, str]] = (),
    grain: float = 1,
) -> dict[str, Any] | None:
    """Points in a plane; `show` spells (right, up), `legend` holds (name, look, shape). None without points.

    grain   the unit that ticks to the right are round in: 2**20 for MiB
    """
    points = [p for p in points if p.x[0] is not None and p.y[0] is not None]
    if not points:
        return None
    ys = [y for p in points for y in p.y if y is not None]
    positive = [y for y in ys if y > 0]
    spread = len(positive) == len(ys) and max(ys) > LOG_FROM * min(ys)
    up = axis([*ys, *(rule.value for rule in rules if not spread or rule.value > 0)], log=spread)
    up = up if spread else Axis(up.low - 0.05 * (up.high - up.low), up.high)
    across = axis([x for p in points for x in p.x if x is not None], zero=False)
    marks = [mark for p in points for mark in [_point(p, across, up)] if mark]
    height, width = SMALL if len(marks) <= 2 else LARGE
    spread_labels(marks, height, width)
    ticks = [grain * tick for tick in nice_ticks(across.low / grain, across.high / grain, 4)]
    front = sorted({(mark["x"], mark["y"]) for mark in marks if mark["front"]})
    return {
        **frame(title, up, show[1], names, rules, marks),
        "height": height,
        "crowded": len(marks) > 4,
        "columns": columns([show[0](x) for x in ticks], [across.place(x) for x in ticks], grid=True),
        "curves": [{"points": " ".join(f"{x},{y}" for x, y in front), "class": "front"}] if len(front) > 1 else [],
        "bands": [],
        "marks": marks,
        "legend": [entry(*one) for one in legend],
    }


def _point(point: Point, across: Axis, up: Axis) -> dict[str, Any] | None:
    (x, left, right), (y, low, high) = point.x, point.y
    if x is None or y is None:
        return None
    mark = mark_at(across.place(x), y, low, high, up, point.look, point.shape)
    if left is not None and right is not None:
        mark |= {"left": across.place(left), "right": across.place(right)}
    return {**mark, "label": point.name, "front": point.front, "title": point.title or point.name}


def spread_labels(marks: list[dict[str, Any]], height: int, width: int) -> None:
    """Set each mark's `dy` (pixels down from its point) and `side`, so that labels do not lie on one another or on
    points. A label stands right of its point, left where the field ends, and is moved up or down as little as need be.

    `height` and `width` are the field's.
    """
    spots = [(mark["x"] / 100 * width, mark["y"] / 100 * height) for mark in marks]
    taken: list[Box] = [(x - 7, y - 6, x + 7, y + 6) for x, y in spots]
    for index in sorted(range(len(marks)), key=lambda i: (spots[i][1], spots[i][0])):
        (x, y), wide = spots[index], LETTER * len(marks[index]["label"])
        sides = [side for side, fits in (("start", x + wide + 12 <= width), ("end", x >= wide + 12)) if fits] or [
            "start"
        ]
        places = [(step, side) for step in SHIFTS for side in sides if LINE / 2 <= y + step <= height - LINE / 2]
        boxes = {place: _label_box(x, y + place[0], wide, place[1]) for place in places or [(0, sides[0])]}
        others = taken[:index] + taken[index + 1 :]
        free = (place for place in boxes if not any(_overlap(boxes[place], box) for box in others))
        step, side = next(free, next(iter(boxes)))
        taken.append(boxes[(step, side)])
        marks[index] |= {"dy": step + 4, "side": side}


def _label_box(x: float, y: float, wide: float, side: str) -> Box:
    begin = x + 10 if side == "start" else x - 10 - wide
    return begin, y - LINE / 2, begin + wide, y + LINE / 2


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
