"""Axes: the range that holds some values, where a value lies on it, and round ticks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


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
        if low == high:
            return Axis(0.0, 1.0 if cap is None else cap)
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
