"""How far a 4-bit model is from its BF16 baseline, token by token: perplexity, KL divergence, top-1 agreement.

Both models read the same batches. Every figure carries a bootstrap interval, and beside it stands the noise
floor: the baseline against itself in other shapes, below which no difference means anything.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import bootstrap
from halfbyte.evaluate.scoring import logits_of, pair_statistics, scored_positions
from halfbyte.evaluate.windows import Windows, batches
from halfbyte.files import make_directory, write_json
from halfbyte.types import Progress, Quiet

EVAL = "eval.json"
NOISE_TOKENS = 2048
"""Tokens that the noise floor is measured on."""
QUANTILES = {"kl_median": 0.5, "kl_p99": 0.99, "kl_p999": 0.999}


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, arrays [N]: log-likelihoods and KL in nats (float32), top1 (bool), window, position (int64)."""

    loglik_baseline: np.ndarray
    loglik: np.ndarray
    kl: np.ndarray
    top1: np.ndarray
    window: np.ndarray
    position: np.ndarray

    def save(self, path: Path | str) -> None:
        """All arrays into one compressed .npz file."""
        np.savez_compressed(path, **self.__dict__)


@dataclass(frozen=True)
class Fidelity:
    """The result of `compare`: token scores, the metrics and noise floor of eval.json, seconds."""

    scores: TokenScores
    metrics: dict[str, dict[str, float]]
    noise_floor: dict[str, Any]
    windows: Windows
    seconds: float

    def result(self, model: str, baseline: str) -> dict[str, Any]:
        """The content of eval.json."""
        return {
            "schema": 1,
            "kind": "eval",
            "model": model,
            "baseline": baseline,
            "text": self.windows.describe(),
            "metrics": self.metrics,
            "noise_floor": self.noise_floor,
            "self_generated": self.windows.self_generated,
            "seconds": round(self.seconds, 3),
            "confidence": bootstrap.CONFIDENCE,
        }


def compare(
    baseline: Any,
    model: Any,
    windows: Windows,
    *,
    batch_tokens: int = 1024,
    progress: Progress | None = None,
    seed: int = 0,
    noise_tokens: int = NOISE_TOKENS,
) -> Fidelity:
    """Score `model` against `baseline` (transformers causal LMs in eval mode, one vocabulary) on `windows`.

    batch_tokens    tokens a batch, padding included; both models' logits of one batch are held at a time.
    noise_tokens    how many tokens' windows the noise floor takes (two runs of the baseline more for these).
    Raises HalfbyteError when the vocabularies differ or a model gives NaN.
    """
    progress = progress or Quiet()
    started = time.monotonic()
    progress.start("comparing with the baseline", len(windows))
    scores = _score(baseline, model, windows, batch_tokens, progress)
    noise = noise_floor(baseline, windows.first(enough(windows, noise_tokens)), batch_tokens, progress)
    return Fidelity(scores, summary(scores, seed), noise, windows, time.monotonic() - started)


def noise_floor(
    baseline: Any, windows: Windows, batch_tokens: int = 1024, progress: Progress | None = None
) -> dict[str, Any]:
    """The baseline against itself: whole windows in batches, and each alone in two pieces through the KV cache."""
    progress = progress or Quiet()
    progress.start("measuring the noise floor", len(windows))
    scores = _score(baseline, None, windows, batch_tokens, progress)
    gap = scores.loglik_baseline.astype(np.float64) - scores.loglik
    return {
        "kl_mean": float(scores.kl.mean(dtype=np.float64)),
        "top1": float(scores.top1.mean()),
        "ppl_ratio": float(np.exp(gap.mean())),
        "how": f"baseline against itself on {len(windows)} windows: batched whole, and alone in two pieces "
        "through the key-value cache",
    }


def summary(scores: TokenScores, seed: int = 0) -> dict[str, dict[str, float]]:
    """The metrics of eval.json, each {"value", "low", "high"}; a difference of the models is resampled in pairs."""
    unit = np.unique(scores.window, return_inverse=True)[1]
    counts = bootstrap.draw_counts(int(unit.max()) + 1, seed)
    means: dict[str, tuple[float, np.ndarray]] = {}
    gap = scores.loglik_baseline.astype(np.float64) - scores.loglik
    columns = {
        "baseline": scores.loglik_baseline,
        "model": scores.loglik,
        "gap": gap,
        "kl": scores.kl,
        "top1": scores.top1,
    }
    for name, values in columns.items():
        exact = values.astype(np.float64)
        means[name] = (float(exact.mean()), bootstrap.mean_replicates(exact, unit, counts))

    def metric(name: str, transform: Any = lambda x: x) -> dict[str, float]:
        value, replicates = means[name]
        return bootstrap.interval(transform(replicates), transform(value))

    found = {
        "ppl_baseline": metric("baseline", lambda x: np.exp(-x)),
        "ppl": metric("model", lambda x: np.exp(-x)),
        "ppl_ratio": metric("gap", np.exp),
        "kl_mean": metric("kl"),
        "top1": metric("top1"),
        "loglik_gap": metric("gap"),
    }
    drawn = bootstrap.quantile_replicates(scores.kl, unit, counts, tuple(QUANTILES.values()))
    for i, (name, q) in enumerate(QUANTILES.items()):
        found[name] = bootstrap.interval(drawn[:, i], bootstrap.quantile(scores.kl, q))
    return found


def write_result(directory: Path | str, fidelity: Fidelity, model: str, baseline: str) -> Path:
    """Write eval.json (whole or not at all) into `directory`; returns its path."""
    path = Path(directory) / EVAL
    make_directory(path.parent)
    write_json(path, fidelity.result(model, baseline))
    return path


def _score(baseline: Any, model: Any, windows: Windows, batch_tokens: int, progress: Progress) -> TokenScores:
    """Scores of every token, in the windows' order. No model: the baseline against itself in other shapes."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in TokenScores.__dataclass_fields__}
    for members, ids in batches(windows, batch_tokens):
        row, position = scored_positions(windows, members, ids.shape[1])
        if not len(row):
            progress.advance(len(members))
            continue
        p = logits_of(baseline, ids)
        q = _alone(baseline, ids) if model is None else logits_of(model, ids)
        if p.shape != q.shape:
            raise HalfbyteError(
                f"the models have {p.shape[-1]} and {q.shape[-1]} tokens in their vocabularies: name the BF16 original"
            )
        for name, values in pair_statistics(p, q, ids, row, position).items():
            columns[name].append(values.numpy())
        columns["window"].append(torch.tensor(members)[row].numpy())
        columns["position"].append(position.numpy())
        progress.advance(len(members))
    return collected(columns)


def collected(columns: dict[str, list[np.ndarray]]) -> TokenScores:
    """Batches' columns, [N] each, as one in the windows' order. Raises HalfbyteError for none, or for NaN in them."""
    if not columns["kl"]:
        raise HalfbyteError("no token to score: give longer windows")
    arrays = {name: np.concatenate(values) for name, values in columns.items()}
    if not (np.isfinite(arrays["loglik"]).all() and np.isfinite(arrays["loglik_baseline"]).all()):
        raise HalfbyteError("a model gives NaN or infinite log-likelihoods: run `halfbyte check` on the artifact")
    order = np.lexsort((arrays["position"], arrays["window"]))
    return TokenScores(**{name: values[order] for name, values in arrays.items()})


def enough(windows: Windows, tokens: int) -> int:
    """How many of the first windows hold `tokens` tokens (all of them, where they hold fewer)."""
    held = np.cumsum([len(ids) for ids in windows.ids])
    return min(len(windows), int(np.searchsorted(held, tokens)) + 1)


def _alone(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of each row by itself, in two pieces of uneven length."""
    split = max(1, ids.shape[1] * 2 // 5) if ids.shape[1] > 1 else 0
    return torch.cat([logits_of(model, one.unsqueeze(0), split) for one in ids])
