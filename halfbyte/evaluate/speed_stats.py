"""Medians of a few repeats with intervals that hold for so few, and ratios of two medians.

Rates are positive and their noise is relative, so that all is done on logarithms. With s the standard deviation of n
logarithms, the median's standard error is about e = 1.2533 s / sqrt(n) (the normal limit sqrt(pi/2); for small n it is
a little less, so this is on the safe side), and the interval is median · exp(± t e) with Student's t at n - 1 degrees.
A ratio's error is sqrt(e1² + e2²), its degrees of freedom Welch and Satterthwaite's. A bootstrap over three repeats
could never leave their range, and would hold the truth three times in four.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as student

from halfbyte.evaluate.bootstrap import CONFIDENCE

MEDIAN_FACTOR = math.sqrt(math.pi / 2)


def median_interval(values: Sequence[float]) -> dict[str, float]:
    """{"value": the median, "low", "high"} of two or more positive figures of the same thing."""
    centre = statistics.median(values)
    reach = _t(len(values) - 1) * _error(values)
    return {"value": centre, "low": centre * math.exp(-reach), "high": centre * math.exp(reach)}


def ratio_interval(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """{"value", "low", "high"}: median of `ours` over median of `theirs`, two or more of each."""
    centre = statistics.median(ours) / statistics.median(theirs)
    one, two = _error(ours), _error(theirs)
    error = math.hypot(one, two)
    if error == 0:
        return {"value": centre, "low": centre, "high": centre}
    degrees = error**4 / (one**4 / (len(ours) - 1) + two**4 / (len(theirs) - 1))
    reach = _t(degrees) * error
    return {"value": centre, "low": centre * math.exp(-reach), "high": centre * math.exp(reach)}


def apart(values: Sequence[float]) -> float:
    """How far positive figures of the same thing lie apart: 0.1 is 10 %."""
    return round(max(values) / min(values) - 1, 4)


def unsure(values: Sequence[float]) -> float:
    """By how much another median must differ to be told from theirs: as far as they lie apart, and not within the
    interval of their own; 0.1 is 10 %."""
    interval = median_interval(values)
    return max(apart(values), round(interval["high"] / interval["value"] - 1, 4))


def _error(values: Sequence[float]) -> float:
    """The standard error of the median of the logarithms."""
    return MEDIAN_FACTOR * statistics.stdev(map(math.log, values)) / math.sqrt(len(values))


def _t(degrees: float) -> float:
    return float(student.ppf((1 + CONFIDENCE) / 2, degrees))
