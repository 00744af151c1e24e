"""Which cell is best: by quality, then tokens/s, cells that cannot be told apart called equal; and a Pareto front.

Every cell was scored on the same windows against the same BF16 model, so two cells are compared in pairs: windows are
drawn with replacement, both cells' together, and where the interval of their difference holds 0, or the difference is
smaller than the noise floor (BF16 against itself in another batch shape), they are equal. Equality is with the best
cell of a rank, not with the next one, so that a rank never spans more than what cannot be told from its best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfbyte.evaluate import bootstrap

BY = {"kl": "kl", "ppl": "gap"}
"""What a cell may be ranked by, and the window sums that tell: KL, or the log-likelihood lost (log of the ratio)."""


@dataclass(frozen=True)
class Scored:
    """One cell as the ranking sees it. `sums`: evaluate.reference.window_sums; `speed`: tokens/s, None not measured."""

    name: str
    sums: Mapping[str, Sequence[float]]
    bytes: int
    speed: float | None = None

    def value(self, by: str) -> float:
        """Mean nats a token."""
        return float(np.sum(self.sums[BY[by]]) / max(1, np.sum(self.sums["tokens"])))


def rank(cells: Sequence[Scored], noise_floor: Mapping[str, Any], by: str = "kl") -> list[dict[str, Any]]:
    """The cells in order, best first: {"name", "rank", "equal_to", "difference", "why", "pareto"}.

    rank         1, 1, 3, …: equal cells share one
    equal_to     the best cell of the rank, None for that cell itself
    difference   to the best cell of the rank (of the rank above, for a rank's best): {"value", "low", "high"} nats
    why          how the two were told apart, or why not
    Within a rank: more tokens/s first (where both were measured), then fewer bytes, then the better figure.
    """
    floor = floor_of(noise_floor, by)
    ordered = sorted(cells, key=lambda cell: (cell.value(by), cell.name))
    tiers: list[list[tuple[Scored, dict[str, float] | None, str]]] = []
    for cell in ordered:
        best = tiers[-1][0][0] if tiers else None
        if best is None:
            tiers.append([(cell, None, "the best")])
            continue
        gap = difference(cell, best, by)
        why = verdict(gap, floor)
        if why:
            tiers[-1].append((cell, gap, why))
        else:
            tiers.append([(cell, gap, "paired bootstrap")])
    timed = all(cell.speed is not None for cell in ordered)
    front = pareto([c.name for c in ordered], [_axes(c, by, timed) for c in ordered])
    rows: list[dict[str, Any]] = []
    for tier in tiers:
        number, first = len(rows) + 1, tier[0][0].name
        for cell, apart, told in sorted(tier, key=lambda entry: _within(entry[0], by)):
            equal = None if cell.name == first else first
            row = {"name": cell.name, "rank": number, "equal_to": equal, "difference": apart, "why": told}
            rows.append({**row, "pareto": cell.name in front})
    return rows


def difference(cell: Scored, other: Scored, by: str = "kl", seed: int = 0) -> dict[str, float]:
    """How many nats a token `cell` is worse than `other`, with the paired bootstrap's 95 % interval over windows."""
    apart = np.asarray(cell.sums[BY[by]], dtype=np.float64) - np.asarray(other.sums[BY[by]], dtype=np.float64)
    tokens = np.asarray(cell.sums["tokens"], dtype=np.float64)
    counts = bootstrap.draw_counts(len(tokens), seed)
    replicates = (counts @ apart) / np.maximum(1, counts @ tokens)
    return bootstrap.interval(replicates, float(apart.sum() / max(1, tokens.sum())))


def verdict(gap: Mapping[str, float], floor: float) -> str:
    """Why two cells are equal; empty where they are not."""
    if gap["value"] == 0 and gap["low"] == 0 and gap["high"] == 0:
        return "the same figures"
    if abs(gap["value"]) <= floor:
        return "within the noise floor"
    return "paired bootstrap" if gap["low"] <= 0 <= gap["high"] else ""


def floor_of(noise_floor: Mapping[str, Any], by: str) -> float:
    """The noise floor in the unit of `by`: nats of KL, or of log perplexity."""
    return float(noise_floor["kl_mean"]) if by == "kl" else abs(math.log(noise_floor["ppl_ratio"]))


def pareto(names: Sequence[str], axes: Sequence[tuple[float, ...]]) -> set[str]:
    """Those that no other beats: nowhere worse (smaller is better), and better on one axis."""

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b))

    return {name for name, mine in zip(names, axes) if not any(beats(other, mine) for other in axes)}


def _axes(cell: Scored, by: str, timed: bool) -> tuple[float, ...]:
    """Quality, bytes, and speed where every cell's was measured."""
    return (cell.value(by), float(cell.bytes), *([-float(cell.speed or 0)] if timed else []))


def _within(cell: Scored, by: str) -> tuple[float, int, float, str]:
    return (math.inf if cell.speed is None else -cell.speed, cell.bytes, cell.value(by), cell.name)
