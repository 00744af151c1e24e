"""Two models on the same items: paired differences, recovery, flips and length, with bootstrap intervals over items.

Items are drawn with replacement, both models' together, so what is hard about an item cancels in a difference
(Koehn, Statistical Significance Tests for Machine Translation Evaluation, 2004).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import bootstrap

LENGTH_LIMIT = 1.25
"""How many times as long as BF16's the answers may be on average, before the 4-bit model counts as rambling."""
SLOW_REPLICATES = 200
"""Replicates of a metric that is no function of means, and has to be computed anew for each."""


@dataclass(frozen=True)
class Statistic:
    """How items' values become a figure: a function of their means, or (slow) of the list of the items themselves.

    of_means    maps means [R, S] of S numbers an item to figures [R]
    of_items    maps a list of items, whatever they are, to a figure
    """

    of_means: Callable[[np.ndarray], np.ndarray] | None = None
    of_items: Callable[[list[Any]], float] | None = None

    def value(self, items: Sequence[Any]) -> float:
        """The figure of all items."""
        return float(self.replicates(items, np.ones((1, len(items)), dtype=np.int64))[0])

    def replicates(self, items: Sequence[Any], counts: np.ndarray) -> np.ndarray:
        """The figure in every replicate, float64 [R]; counts [R, N]: how often each item is drawn."""
        if self.of_means is not None:
            table = np.asarray(items, dtype=np.float64).reshape(len(items), -1)
            return np.asarray(self.of_means(counts @ table / counts.sum(axis=1, keepdims=True)), dtype=np.float64)
        assert self.of_items is not None
        drawn = (np.repeat(np.arange(len(items)), row).tolist() for row in counts)
        return np.array([float(self.of_items([items[i] for i in members])) for members in drawn])


MEAN = Statistic(of_means=lambda means: means[:, 0])
PERPLEXITY = Statistic(of_means=lambda means: np.exp(-means[:, 0]))
"""Items are log-likelihoods in nats."""


@dataclass(frozen=True)
class Compared:
    """A row of tasks.json, and the replicates that an average over tasks needs ([R] each)."""

    row: dict[str, Any]
    difference: np.ndarray
    recovery: np.ndarray


def compare_items(
    name: str,
    metric: str,
    baseline: Sequence[Any],
    model: Sequence[Any],
    *,
    statistic: Statistic = MEAN,
    higher_is_better: bool = True,
    correct: tuple[Sequence[Any], Sequence[Any]] | None = None,
    lengths: tuple[Sequence[int], Sequence[int]] | None = None,
    seed: int = 0,
) -> Compared:
    """Both models' values of the same items, in the same order, as a row of tasks.json.

    correct     what flips are counted in, where the items' values themselves are not 0 and 1
    lengths     tokens of both models' generated answers
    Raises HalfbyteError when there is no item, or the two sides have not the same.
    """
    if not len(baseline) or len(baseline) != len(model):
        raise HalfbyteError(f"{name} gave {len(baseline)} and {len(model)} items: there is nothing to compare in pairs")
    replicates = bootstrap.REPLICATES if statistic.of_means else SLOW_REPLICATES
    counts = bootstrap.draw_counts(len(baseline), seed + zlib.crc32(name.encode()), replicates)
    values = statistic.value(baseline), statistic.value(model)
    drawn = statistic.replicates(baseline, counts), statistic.replicates(model, counts)
    recovered = _recovery(drawn[0], drawn[1], higher_is_better)
    recovery = float(_recovery(np.array([values[0]]), np.array([values[1]]), higher_is_better)[0])
    row = {
        "name": name,
        "metric": metric,
        "higher_is_better": higher_is_better,
        "items": len(baseline),
        "baseline": bootstrap.interval(drawn[0], values[0]),
        "model": bootstrap.interval(drawn[1], values[1]),
        "difference": bootstrap.interval(drawn[1] - drawn[0], values[1] - values[0]),
        "recovery": _ratio_interval(recovered, recovery),
        "flips": flips(*(correct or (baseline, model))),
        "length": length_ratio(*lengths, counts) if lengths else None,
    }
    return Compared(row, drawn[1] - drawn[0], recovered)


def flips(baseline: Sequence[Any], model: Sequence[Any]) -> float | None:
    """The share of items that are right for one model and wrong for the other; None where values are not 0 and 1."""
    try:
        pair = np.asarray(baseline, dtype=np.float64), np.asarray(model, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if pair[0].ndim != 1 or not all(np.isin(side, (0, 1)).all() for side in pair):
        return None
    return float((pair[0] != pair[1]).mean())


def length_ratio(baseline: Sequence[int], model: Sequence[int], counts: np.ndarray) -> dict[str, Any]:
    """{"baseline", "model" (mean tokens), "ratio" with its interval, "limit", "passed"}.

    It fails when the ratio is beyond the limit and its interval excludes 1: longer by much, and not by chance. Where
    BF16 says nothing at all there is no ratio, and it passes only if 4 bits say nothing either.
    """
    before, after = (np.asarray(side, dtype=np.float64) for side in (baseline, model))
    means = float(before.mean()), float(after.mean())
    if means[0] == 0:
        ratio, passed = None, means[1] == 0
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = _ratio_interval((counts @ after) / (counts @ before), means[1] / means[0])
        passed = ratio is not None and not (ratio["value"] > LENGTH_LIMIT and ratio["low"] > 1)
    return {"baseline": means[0], "model": means[1], "ratio": ratio, "limit": LENGTH_LIMIT, "passed": passed}


def average(rows: Sequence[Compared]) -> dict[str, Any]:
    """{"difference", "recovery"} over tasks: the difference over metrics that are the better the higher they are, the
    recovery over all that have one; None where no task counts."""
    higher = [c for c in rows if c.row["higher_is_better"]]
    known = [c for c in rows if c.row["recovery"] is not None]
    return {"difference": _mean_of(higher, "difference"), "recovery": _mean_of(known, "recovery")}


def _mean_of(rows: Sequence[Compared], field: str) -> dict[str, float] | None:
    if not rows:
        return None
    size = min(len(getattr(c, field)) for c in rows)
    drawn = np.mean([getattr(c, field)[:size] for c in rows], axis=0)
    return _ratio_interval(drawn, float(np.mean([c.row[field]["value"] for c in rows])))


def _recovery(baseline: np.ndarray, model: np.ndarray, higher_is_better: bool) -> np.ndarray:
    """How much of the baseline's figure is kept; above 1 is better than the baseline. NaN where that is nothing."""
    part, whole = (model, baseline) if higher_is_better else (baseline, model)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(whole == 0, np.nan, part / whole)


def _ratio_interval(replicates: np.ndarray, value: float) -> dict[str, float] | None:
    """An interval over the replicates in which the ratio exists; None where it has no value itself."""
    known = replicates[np.isfinite(replicates)]
    return bootstrap.interval(known, value) if np.isfinite(value) and len(known) else None
