"""Confidence intervals by the bootstrap over windows: windows are drawn with replacement, both models' together.

Tokens of one window depend on each other, so windows are what is drawn (Efron & Tibshirani, An Introduction to the
Bootstrap, 1993: percentile intervals; blocks as in chapter 8).
"""

from __future__ import annotations

import numpy as np

REPLICATES = 1000
CONFIDENCE = 0.95
_CHUNK = 4_000_000


def draw_counts(units: int, seed: int, replicates: int = REPLICATES) -> np.ndarray:
    """How often each of `units` windows is drawn, int64 [replicates, units]."""
    return np.random.default_rng([seed, 3]).multinomial(units, np.full(units, 1 / units), size=replicates)


def mean_replicates(values: np.ndarray, window: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The token mean of `values` [N] in every replicate, float64 [replicates]; `window` [N] is each token's window."""
    units = counts.shape[1]
    sums = np.bincount(window, weights=values, minlength=units)
    sizes = np.bincount(window, minlength=units)
    return (counts @ sums) / np.maximum(1, counts @ sizes)


def quantile_replicates(
    values: np.ndarray, window: np.ndarray, counts: np.ndarray, quantiles: tuple[float, ...]
) -> np.ndarray:
    """Quantiles (inverted distribution function) of `values` in every replicate, [replicates, len(quantiles)]."""
    order = np.argsort(values, kind="stable")
    ordered, unit = values[order], window[order]
    found = np.empty((len(counts), len(quantiles)))
    step = max(1, _CHUNK // len(values))
    for start in range(0, len(counts), step):
        heights = counts[start : start + step][:, unit].cumsum(axis=1)
        for i, height in enumerate(heights):
            marks = np.maximum(1, np.ceil(np.asarray(quantiles) * height[-1] - 1e-9))
            found[start + i] = ordered[np.searchsorted(height, marks)]
    return found


def quantile(values: np.ndarray, q: float) -> float:
    """The same quantile of the values themselves."""
    return float(np.quantile(values, q, method="inverted_cdf"))


def interval(replicates: np.ndarray, value: float) -> dict[str, float]:
    """{"value", "low", "high"}: percentile interval at CONFIDENCE."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(replicates, [tail, 1 - tail])
    return {"value": float(value), "low": float(low), "high": float(high)}
