"""Where two models differ: by position, by the baseline's confidence, as a histogram of KL, and the worst tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.evaluate import bootstrap

if TYPE_CHECKING:
    import torch

    from halfbyte.evaluate.fidelity import TokenScores

FIRST_POSITIONS = 16
"""The first bucket of positions ends here; each further one ends at twice the position."""
CONFIDENCE_BUCKETS = 10
HISTOGRAM = (-6.0, 1.0, 0.25)
"""Decades of KL: from, to, step."""
WORST = 20
CONTEXT_TOKENS = 24
"""Tokens of text shown before one of the worst."""
LEAST_WINDOWS = 2
"""Windows that a bucket needs for an interval; a bucket of fewer joins its neighbour."""


def by_position(scores: TokenScores, seed: int = 0) -> list[dict[str, Any]]:
    """Rows {"from", "to" (positions in the window, `to` not included), "kl", "top1"}: buckets that double."""
    edges = [1, FIRST_POSITIONS]
    while edges[-1] <= scores.position.max():
        edges.append(2 * edges[-1])
    rows = []
    for low, high, mask in _buckets(scores.position, edges, scores.window):
        rows.append({"from": low, "to": high, **_metrics(scores, mask, seed)})
    return rows


def by_confidence(scores: TokenScores, seed: int = 0) -> list[dict[str, Any]]:
    """Rows {"from", "to" (the baseline's probability of its most likely token), "tokens", "kl", "top1"}."""
    edges = [i / CONFIDENCE_BUCKETS for i in range(CONFIDENCE_BUCKETS + 1)]
    rows = []
    for low, high, mask in _buckets(np.minimum(scores.shares[:, 0], 1 - 1e-9), edges, scores.window):
        rows.append({"from": low, "to": high, "tokens": int(mask.sum()), **_metrics(scores, mask, seed)})
    return rows


def kl_histogram(kl: np.ndarray) -> dict[str, list[Any]]:
    """{"edges" [n + 1] in nats, "counts" [n]}: logarithmic, with everything below the first decade in the first bin
    and everything above the last in the last. No token is left out."""
    start, stop, step = HISTOGRAM
    inner = 10 ** np.arange(start, stop + step / 2, step)
    edges = [0.0, *(float(f"{x:.4g}") for x in inner)]
    edges[-1] = max(edges[-1], float(kl.max()))
    counts = np.histogram(kl.astype(np.float64), bins=edges)[0]
    return {"edges": edges, "counts": counts.tolist()}


def worst(
    scores: TokenScores, ids: Sequence[torch.Tensor], tokenizer: Any = None, count: int = WORST
) -> list[dict[str, Any]]:
    """The tokens with the largest KL, in the text that leads to them.

    Each {"kl", "window", "position", "context" (the text before), "token" (what came), "baseline_top", "model_top",
    "probabilities": {"baseline_top", "model_top", "token": {"baseline", "model"}}}.
    """

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(tokens)) if tokenizer is not None else " ".join(f"[{t}]" for t in tokens)

    rows = []
    for i in np.argsort(-scores.kl, kind="stable")[:count].tolist():
        window, at = int(scores.window[i]), int(scores.position[i])
        before = ids[window][max(0, at - CONTEXT_TOKENS) : at].tolist()
        p_base, p_model, q_base, q_model = (float(x) for x in scores.shares[i])
        token = (float(np.exp(x[i])) for x in (scores.loglik_baseline, scores.loglik))
        rows.append(
            {
                "kl": float(scores.kl[i]),
                "window": window,
                "position": at,
                "context": text(before),
                "token": text([int(scores.token[i])]),
                "baseline_top": text([int(scores.top_baseline[i])]),
                "model_top": text([int(scores.top[i])]),
                "probabilities": {
                    "baseline_top": {"baseline": p_base, "model": q_base},
                    "model_top": {"baseline": p_model, "model": q_model},
                    "token": dict(zip(("baseline", "model"), token)),
                },
            }
        )
    return rows


def _metrics(scores: TokenScores, mask: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    """Mean KL and agreement over some tokens, with intervals over the windows that hold any of them."""
    unit = np.unique(scores.window[mask], return_inverse=True)[1]
    counts = bootstrap.draw_counts(int(unit.max()) + 1, seed)
    found = {}
    for name, values in {"kl": scores.kl, "top1": scores.top1}.items():
        kept = values[mask].astype(np.float64)
        found[name] = bootstrap.interval(bootstrap.mean_replicates(kept, unit, counts), float(kept.mean()))
    return found


def _buckets(
    values: np.ndarray, edges: Sequence[float], window: np.ndarray
) -> Iterator[tuple[float, float, np.ndarray]]:
    """(from, to, mask of the tokens in it) for neighbours in `edges`. What holds tokens of too few windows is joined to
    the bucket before it, or the first such to the one behind, so that every token is in one bucket."""

    def inside(span: tuple[float, float]) -> np.ndarray:
        return (values >= span[0]) & (values < span[1])

    def thin(span: tuple[float, float]) -> bool:
        return len(np.unique(window[inside(span)])) < LEAST_WINDOWS

    spans: list[tuple[float, float]] = []
    for span in pairwise(edges):
        if spans and inside(span).any() and (thin(span) or thin(spans[-1])):
            spans[-1] = (spans[-1][0], span[1])
        elif inside(span).any():
            spans.append(span)
    for span in spans:
        yield *span, inside(span)
