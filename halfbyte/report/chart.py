"""Geometry of a chart: curves over named steps, a histogram, and what every chart has.

Places are percent of the field, so that one picture fits every width while its words keep their size; the template
draws them as SVG. A value is (value, low, high), low and high None where there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.report.axes import Axis, axis

Value = tuple[float | None, float | None, float | None]
Show = Callable[[float], str]
FIELD = 270
"""Pixels of the field's width on the narrowest screen that is cared for."""
LETTER = 6.6
"""Pixels of a letter, at most."""
HEIGHT = 210
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
class Rule:
    """A level that values are to be held against: a limit, a noise floor, nothing lost."""

    value: float
    name: str


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
        **frame(title, up, tick or show, names, rules, marks),
        "columns": columns(steps, places),
        "curves": [curve for one in series for curve in _curves(one, places, up)],
        "bands": [band for one in series for band in _bands(one, places, up)],
        "marks": marks,
        "legend": [entry(one.name, one.look, one.shape, one.dashed) for one in series] if len(series) > 1 else [],
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
        **frame(title, up, show, names, ()),
        "columns": _ticked(ticks, places) if ticks else columns(edges, places),
        "bars": bars,
        "curves": [],
        "bands": [],
        "marks": [],
        "legend": [],
    }


def frame(
    title: str,
    up: Axis,
    show: Show,
    names: tuple[str, str],
    rules: Sequence[Rule],
    marks: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """What every chart has: title, the names of its axes (up, right), lines across with their labels, levels."""
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


def columns(labels: Sequence[str], places: Sequence[float], grid: bool = False) -> list[dict[str, Any]]:
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
    return columns([label for label, _ in named], [place for _, place in named])


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
            marks.append({**mark_at(x, value, low, high, up, one.look, one.shape), "title": words})
    return marks


def _between(low: float | None, high: float | None, show: Show) -> str:
    return "" if low is None or high is None else f" ({show(low)} to {show(high)})"


def mark_at(
    x: float, value: float, low: float | None, high: float | None, up: Axis, look: str, shape: str
) -> dict[str, Any]:
    """A value's place, with the ends of its interval; `x` in percent of the field."""
    mark: dict[str, Any] = {"x": x, "y": _y(up, value), "class": look, "shape": SHAPES[shape], "front": False}
    if low is not None and high is not None:
        mark |= {"low": _y(up, low), "high": _y(up, high)}
    return mark


def entry(name: str, look: str, shape: str, dashed: bool = False) -> dict[str, Any]:
    """One line of a legend."""
    return {"name": name, "class": look, "shape": SHAPES[shape], "dashed": dashed}
