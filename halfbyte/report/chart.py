"""Geometry of a chart: curves over named steps, points in a plane, a histogram.

Places are percent of the field, so that one picture fits every width while its words keep their size; the template
draws them as SVG. A value is (value, low, high), low and high None where there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Value = tuple[float | None, float | None, float | None]
Show = Callable[[float], str]
FIELD = 270
"""Pixels of the field's width on the narrowest screen that is cared for."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels."""
LINE = 13
"""Pixels of a label's line."""
SHIFTS = [0, *(sign * step for step in range(4, 120, 4) for sign in (1, -1))]
"""How far a label is moved down (or up) from its point, in pixels, the least first."""
LETTER = 6.6
"""Pixels of a letter, at most."""
HEIGHT = 210
LARGE, SMALL = (300, 430), (150, 210)
"""Height and (about) width of a plane with many points, and of one with two at most."""
LOG_FROM = 40
"""A ratio of largest to smallest value from which on an axis is logarithmic."""
SHAPES = {
    "dot": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "square": "M-4 -4h8v8h-8z",
    "diamond": "M0 -5.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
    "triangle": "M0 -5.2l5.2 9h-10.4z",
}


@dataclass(frozen=True)
class Series:
    """A curve: one value for each step (None: not measured there). `look` is a colour's class, `shape` of SHAPES."""

    name: str
    look: str
    values: Sequence[Value]
    shape: str = "dot"
    dashed: bool = False


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


@dataclass(frozen=True)
class Rule:
    """A level that values are to be held against: a limit, a noise floor, nothing lost."""

    value: float
    name: str


@dataclass(frozen=True)
class Axis:
    """A range and its ticks; `place` gives percent from its beginning."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        if self.log:
            value, low, high = (math.log10(max(x, 1e-300)) for x in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        return round(min(100.0, max(0.0, 100 * (value - low) / (high - low))), 2)

    def ticks(self, most: int = 5) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high, most)


def axis(values: Sequence[float], zero: bool = True, log: bool = False, cap: float | None = None) -> Axis:
    """The range that holds `values` with a little room; with `zero` from (or to) zero; never above `cap`."""
    low, high = min(values), max(values)
    if log and low > 0:
        return Axis(low / 1.3, high * 1.3, log=True)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    room = 0.07 * (high - low) or abs(high) * 0.1 or 1.0
    top = high + room if high > 0 or not zero else 0.0
    return Axis(low - room if low < 0 or not zero else low, top if cap is None else min(max(cap, high), top))


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers within [low, high], steps of 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) + 0.0 for i in range(int((high - first * step) / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], and 2 and 5 times those where that leaves few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**p for p in powers if low <= 10.0**p <= high]
    if len(tens) >= 3:
        return tens
    return [f * 10.0**p for p in powers for f in (1, 2, 5) if low <= f * 10.0**p <= high] or [low, high]


def trend(
    title: str,
    steps: Sequence[str],
    series: Sequence[Series],
    show: Show,
    *,
    tick: Show | None = None,
    names: tuple[str, str] = ("", ""),
    rules: Sequence[Rule] = (),
    zero: bool = True,
    cap: float | None = None,
) -> dict[str, Any] | None:
    """Curves over steps at even distances; None where no series has a value. `names` says (up, right)."""
    held = [x for one in series for value in one.values for x in value if x is not None]
    if not held:
        return None
    up = axis([*held, *(rule.value for rule in rules)], zero, cap=cap)
    places = [round(100 * (i + 0.5) / len(steps), 2) for i in range(len(steps))]
    marks = [mark for one in series for mark in _marks(one, steps, places, up, show)]
    return {
        **_frame(title, up, tick or show, names, rules, marks),
        "columns": _columns(steps, places),
        "curves": [curve for one in series for curve in _curves(one, places, up)],
        "bands": [band for one in series for band in _bands(one, places, up)],
        "marks": marks,
        "legend": [_entry(one.name, one.look, one.shape, one.dashed) for one in series] if len(series) > 1 else [],
    }


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
        **_frame(title, up, show[1], names, rules, marks),
        "height": height,
        "crowded": len(marks) > 4,
        "columns": _columns([show[0](x) for x in ticks], [across.place(x) for x in ticks], grid=True),
        "curves": [{"points": " ".join(f"{x},{y}" for x, y in front), "class": "front"}] if len(front) > 1 else [],
        "bands": [],
        "marks": marks,
        "legend": [_entry(*one) for one in legend],
    }


def histogram(
    title: str,
    edges: Sequence[str],
    counts: Sequence[float],
    show: Show,
    names: tuple[str, str],
    ticks: Sequence[str] | None = None,
) -> dict[str, Any] | None:
    """Bars of even width between named edges; None where all are empty. `ticks`: other labels, "" for none."""
    if len(edges) != len(counts) + 1 or not any(counts):
        return None
    up = axis(list(counts))
    width = 100 / len(counts)
    bars = [
        {
            "x": round(i * width + 0.06 * width, 2),
            "width": round(0.88 * width, 2),
            "y": round(100 - up.place(count), 2),
            "height": up.place(count),
            "title": f"{edges[i]} to {edges[i + 1]}: {show(count)}",
        }
        for i, count in enumerate(counts)
    ]
    places = [round(i * width, 2) for i in range(len(edges))]
    return {
        **_frame(title, up, show, names, ()),
        "columns": _ticked(ticks, places) if ticks else _columns(edges, places),
        "bars": bars,
        "curves": [],
        "bands": [],
        "marks": [],
        "legend": [],
    }


def _frame(
    title: str,
    up: Axis,
    show: Show,
    names: tuple[str, str],
    rules: Sequence[Rule],
    marks: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    drawn = [rule for rule in rules if up.low <= rule.value <= up.high]
    return {
        "title": title,
        "height": HEIGHT,
        "up": names[0],
        "across": names[1],
        "rows": [{"y": round(100 - up.place(y), 2), "label": show(y)} for y in up.ticks()],
        "rules": [_rule(round(100 - up.place(rule.value), 2), rule, marks) for rule in drawn],
        "bars": [],
    }


def _rule(y: float, rule: Rule, marks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A level with its name at the end where fewer marks are near."""
    near = [mark["x"] for mark in marks if abs(mark["y"] - y) < 15]
    side = "end" if sum(x < 50 for x in near) > sum(x >= 50 for x in near) else "start"
    return {"y": y, "label": rule.name, "side": side, "base": not rule.value and not rule.name}


def _columns(labels: Sequence[str], places: Sequence[float], grid: bool = False) -> list[dict[str, Any]]:
    """Labels beneath, every k-th where not all have room."""
    longest = max((len(label) for label in labels), default=1)
    every = max(1, math.ceil(len(labels) * (longest * LETTER + 8) / FIELD))
    return [
        {"x": x, "label": label if i % every == 0 else "", "grid": grid}
        for i, (x, label) in enumerate(zip(places, labels))
    ]


def _ticked(labels: Sequence[str], places: Sequence[float]) -> list[dict[str, Any]]:
    """Those labels that are not empty."""
    named = [(label, place) for label, place in zip(labels, places) if label]
    return _columns([label for label, _ in named], [place for _, place in named])


def _runs(values: Sequence[Value]) -> list[list[int]]:
    """Indices of the steps with a value, in runs without a gap."""
    runs: list[list[int]] = [[]]
    for i, value in enumerate(values):
        if value[0] is not None:
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _curves(one: Series, places: Sequence[float], up: Axis) -> list[dict[str, str]]:
    looks = f"curve {one.look}{' dashed' if one.dashed else ''}"
    return [
        {"class": looks, "points": " ".join(f"{places[i]},{_y(up, one.values[i][0])}" for i in run)}
        for run in _runs(one.values)
        if len(run) > 1
    ]


def _bands(one: Series, places: Sequence[float], up: Axis) -> list[dict[str, str]]:
    found = []
    for run in _runs(one.values):
        if len(run) > 1 and all(None not in one.values[i] for i in run):
            there = [f"{places[i]},{_y(up, one.values[i][2])}" for i in run]
            back = [f"{places[i]},{_y(up, one.values[i][1])}" for i in reversed(run)]
            found.append({"class": f"band {one.look}", "points": " ".join(there + back)})
    return found


def _y(up: Axis, value: float | None) -> float:
    return round(100 - up.place(value if value is not None else up.low), 2)


def _marks(one: Series, steps: Sequence[str], places: Sequence[float], up: Axis, show: Show) -> list[dict[str, Any]]:
    marks = []
    for step, x, (value, low, high) in zip(steps, places, one.values):
        if value is not None:
            words = f"{one.name}, {step}: {show(value)}" + _between(low, high, show)
            marks.append({**_mark(x, value, low, high, up, one.look, one.shape), "title": words})
    return marks


def _between(low: float | None, high: float | None, show: Show) -> str:
    return "" if low is None or high is None else f" ({show(low)} to {show(high)})"


def _mark(
    x: float, value: float, low: float | None, high: float | None, up: Axis, look: str, shape: str
) -> dict[str, Any]:
    mark: dict[str, Any] = {"x": x, "y": _y(up, value), "class": look, "shape": SHAPES[shape], "front": False}
    if low is not None and high is not None:
        mark |= {"low": _y(up, low), "high": _y(up, high)}
    return mark


def _point(point: Point, across: Axis, up: Axis) -> dict[str, Any] | None:
    (x, left, right), (y, low, high) = point.x, point.y
    if x is None or y is None:
        return None
    mark = _mark(across.place(x), y, low, high, up, point.look, point.shape)
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


def _entry(name: str, look: str, shape: str, dashed: bool = False) -> dict[str, Any]:
    return {"name": name, "class": look, "shape": SHAPES[shape], "dashed": dashed}
