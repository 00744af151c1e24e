"""Values as a reader sees them. Result files are data from outside: whatever is not as expected reads as missing."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from typing import Any

MISSING = "not measured"
_VISIBLE = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
LINE = 60
"""Characters of the longest command that stays on one line."""


def dig(data: Any, *path: str) -> Any:
    """data[path[0]][path[1]]…, or None where a step is missing or not a mapping."""
    for key in path:
        if not isinstance(data, dict):
            return None
        data = data.get(key)
    return data


def mapping(data: Any) -> dict[str, Any]:
    """`data` where it is a mapping, else an empty one."""
    return data if isinstance(data, dict) else {}


def listing(data: Any) -> list[Any]:
    """`data` where it is a list, else an empty one."""
    return data if isinstance(data, list) else []


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def text(value: Any, missing: str = "–") -> str:
    """A scalar in words; mappings and lists as compact JSON."""
    if value is None or value == "":
        return missing
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return significant(value)
    return str(value) if isinstance(value, (str, int)) else json.dumps(value, sort_keys=True)


def significant(value: Any, digits: int = 4) -> str:
    """Four significant digits, without an exponent where that is readable."""
    x = number(value)
    if x is None:
        return MISSING
    if x != 0 and not 1e-4 <= abs(x) < 1e7:
        return f"{x:.{digits - 1}g}"
    rounded = f"{x:.{digits}g}"
    return f"{x:,.0f}" if "e" in rounded or abs(x) >= 10**digits else rounded


def percent(value: Any, signed: bool = False) -> str:
    """0.129 as 12.9%; with `signed`, +12.9%."""
    x = number(value)
    if x is None:
        return MISSING
    digits = 2 if abs(100 * x) < 10 or abs(100 * x) > 99 else 1
    return f"{100 * x:{'+' if signed else ''}.{digits}f}%"


def size(value: Any) -> str:
    """Bytes in the largest binary unit that leaves a whole part: 88.9 MiB."""
    x = number(value)
    if x is None:
        return MISSING
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    unit = 0
    while abs(x) >= 1024 and unit < len(units) - 1:
        x /= 1024
        unit += 1
    return f"{x:,.0f} {units[unit]}" if unit == 0 else f"{significant(x, 3)} {units[unit]}"


def seconds(value: Any) -> str:
    """Seconds, or minutes and seconds, or hours and minutes."""
    x = number(value)
    if x is None:
        return MISSING
    if x < 100:
        return f"{significant(x, 3)} s"
    minutes, rest = divmod(round(x), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def command(value: Any) -> str:
    """A command line from a string or a list of words; a long list gets a line for each flag."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else ""
    words = [str(word) for word in value]
    whole = shlex.join(words)
    if len(whole) <= LINE:
        return whole
    lines = [""]
    for word in words:
        if word.startswith("-") and lines[-1]:
            lines.append("  " + shlex.quote(word))
        else:
            lines[-1] = f"{lines[-1]} {shlex.quote(word)}" if lines[-1] else shlex.quote(word)
    return " \\\n".join(lines)


def plural(count: int, word: str) -> str:
    """`1 linear`, `3 linears`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def measure(data: Any) -> tuple[float | None, float | None, float | None]:
    """Value, low and high of {"value", "low", "high"} or of a plain number; None for what is missing."""
    if isinstance(data, dict):
        return number(data.get("value")), number(data.get("low")), number(data.get("high"))
    return number(data), None, None


def between(data: Any, show: Callable[[Any], str]) -> str:
    """The interval of a measure, as `0.1 to 0.2`."""
    _, low, high = measure(data)
    return "–" if low is None or high is None else f"{show(low)} to {show(high)}"


def shown(data: Any, show: Callable[[Any], str]) -> str:
    """The value of a measure; a dash where it is missing."""
    value = measure(data)[0]
    return "–" if value is None else show(value)


def signed(value: Any) -> str:
    """+12.9%, always with a sign: a change."""
    return percent(value, signed=True)


def change(ratio: Any) -> str:
    """A ratio as a change: 1.129 as +12.9%."""
    x = number(ratio)
    return signed(None if x is None else x - 1)


def percent_tick(value: float) -> str:
    """A share on an axis, without idle zeros: 80%."""
    return f"{100 * value:.6g}%"


def points(value: Any) -> str:
    """A difference of two shares, in percentage points: +1.25."""
    x = number(value)
    return "–" if x is None else f"{100 * x:+.2f}"


def count(value: Any) -> str:
    """A whole number: 12,345."""
    x = number(value)
    return "–" if x is None else f"{x:,.0f}"


def visible(value: Any) -> str:
    """Text as it is, with line ends, tabs, control characters and changes of writing direction made visible."""
    if not isinstance(value, str):
        return text(value)
    return "".join(_VISIBLE.get(c) or (c if c.isprintable() else f"\\u{ord(c):04x}") for c in value)
