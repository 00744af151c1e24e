"""Curves over the length: retrieval accuracy and perplexity by position, and how far each drifts from BF16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from halfbyte.evaluate import bootstrap
from halfbyte.evaluate.haystack import Item

BLOCK = 64
"""Tokens of a text that are drawn together in the bootstrap: neighbours depend on each other."""
FIRST_BUCKET = 256


@dataclass(frozen=True)
class Run:
    """One condition's answers: right (1) or wrong (0) for each item, and each window's log-likelihoods [T - 1]."""

    key: str
    right: np.ndarray
    logliks: list[np.ndarray]


def retrieval_rows(items: Sequence[Item], runs: Sequence[Run], seed: int) -> list[dict[str, Any]]:
    """Accuracy for each task, length and depth."""
    rows = []
    for task, length, depth in dict.fromkeys((item.task, item.length, item.depth) for item in items):
        members = [i for i, m in enumerate(items) if (m.task, m.length, m.depth) == (task, length, depth)]
        scores = _accuracies(members, runs, seed)
        rows.append({"task": task, "length": length, "depth": depth, "items": len(members), "scores": scores})
    return rows


def by_length(items: Sequence[Item], runs: Sequence[Run], seed: int) -> list[dict[str, Any]]:
    """Accuracy over all tasks at each length, and how much of BF16's is lost (positive: lost)."""
    rows = []
    for length in dict.fromkeys(item.length for item in items):
        members = [i for i, item in enumerate(items) if item.length == length]
        counts = bootstrap.draw_counts(len(members), seed)
        lost = {
            run.key: bootstrap.interval(counts @ gap / len(members), float(gap.mean()))
            for run in runs[1:]
            for gap in [(runs[0].right - run.right)[members]]
        }
        rows.append({"length": length, "items": len(members), "scores": _accuracies(members, runs, seed), "drop": lost})
    return rows


def retrieval_drift(items: Sequence[Item], runs: Sequence[Run], seed: int) -> dict[str, dict[str, float]]:
    """By condition, the largest drop of accuracy against the first run over the lengths; 0 where there is none."""
    members = [[i for i, m in enumerate(items) if m.length == n] for n in dict.fromkeys(m.length for m in items)]
    found = {}
    for run in runs[1:]:
        gap = runs[0].right - run.right
        drawn = [bootstrap.draw_counts(len(part), seed + k) @ gap[part] / len(part) for k, part in enumerate(members)]
        worst = max(float(gap[part].mean()) for part in members)
        found[run.key] = bootstrap.interval(np.maximum(0.0, np.max(drawn, axis=0)), max(0.0, worst))
    return found


def perplexity_rows(runs: Sequence[Run], seed: int) -> list[dict[str, Any]]:
    """Perplexity in buckets of positions that double, and its ratio to the first run's."""
    rows = []
    for start, end in buckets(max(len(values) for values in runs[0].logliks) + 1):
        columns, unit = _bucket(runs, start, end)
        counts = bootstrap.draw_counts(int(unit.max()) + 1, seed)
        ppl = {run.key: _exp_mean(-columns[run.key], unit, counts) for run in runs}
        ratio = {run.key: _exp_mean(columns[runs[0].key] - columns[run.key], unit, counts) for run in runs[1:]}
        rows.append({"from": start, "to": end, "tokens": len(unit), "ppl": ppl, "ratio": ratio})
    return rows


def ppl_drift(runs: Sequence[Run], seed: int) -> dict[str, dict[str, float]]:
    """By condition, the largest growth of the perplexity ratio from the first bucket to another; 0 where it shrinks."""
    spans = buckets(max(len(values) for values in runs[0].logliks) + 1)
    found = {}
    for run in runs[1:]:
        values, drawn = [], []
        for k, (start, end) in enumerate(spans):
            columns, unit = _bucket([runs[0], run], start, end)
            gap = columns[runs[0].key] - columns[run.key]
            counts = bootstrap.draw_counts(int(unit.max()) + 1, seed + k)
            values.append(float(gap.mean()))
            drawn.append(bootstrap.mean_replicates(gap, unit, counts))
        growth = np.exp(np.max(drawn, axis=0) - drawn[0]) - 1
        found[run.key] = bootstrap.interval(growth, float(np.exp(max(values) - values[0]) - 1))
    return found


def buckets(tokens: int) -> list[tuple[int, int]]:
    """(from, to) of positions 1 .. tokens - 1, `to` not included: up to 256, 512, 1024, ...; a short rest joins."""
    edges = [1]
    while edges[-1] < tokens:
        edges.append(min(tokens, max(FIRST_BUCKET, 2 * edges[-1])))
    if len(edges) > 2 and edges[-1] - edges[-2] < FIRST_BUCKET // 2:
        edges.pop(-2)
    return list(pairwise(edges))


def _accuracies(members: list[int], runs: Sequence[Run], seed: int) -> dict[str, dict[str, float]]:
    counts = bootstrap.draw_counts(len(members), seed)
    return {
        run.key: bootstrap.interval(counts @ run.right[members] / len(members), float(run.right[members].mean()))
        for run in runs
    }


def _bucket(runs: Sequence[Run], start: int, end: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each run's log-likelihoods at positions start..end of all windows [N], and each token's block [N]."""
    columns = {run.key: np.concatenate([w[start - 1 : end - 1] for w in run.logliks]) for run in runs}
    blocks, first = [], 0
    for window in runs[0].logliks:
        size = len(window[start - 1 : end - 1])
        blocks.append(first + np.arange(size) // BLOCK)
        first += -(-size // BLOCK)
    return columns, np.concatenate(blocks)


def _exp_mean(values: np.ndarray, unit: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    exact = values.astype(np.float64)
    return bootstrap.interval(np.exp(bootstrap.mean_replicates(exact, unit, counts)), float(np.exp(exact.mean())))
