"""How far a 4-bit model is from its BF16 baseline, token by token: perplexity, KL divergence, top-1 agreement.

Every figure carries a bootstrap interval, and beside it stands the noise floor: the baseline against itself in other
shapes, below which no difference means anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import bootstrap, breakdown
from halfbyte.evaluate.windows import Windows
from halfbyte.files import make_directory, write_json

EVAL = "eval.json"
QUANTILES = {"kl_median": 0.5, "kl_p99": 0.99, "kl_p999": 0.999}


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, arrays [N]: log-likelihoods and KL in nats (float32), top1 (bool), ids (int64): the token, the
    most likely one of each model; window, position (int64). `shares` [N, 4] as `token_statistics` gives them.
    """

    loglik_baseline: np.ndarray
    loglik: np.ndarray
    kl: np.ndarray
    top1: np.ndarray
    token: np.ndarray
    top_baseline: np.ndarray
    top: np.ndarray
    shares: np.ndarray
    window: np.ndarray
    position: np.ndarray

    @property
    def flips(self) -> np.ndarray:
        """bool [N]: exactly one of the models finds the text's own token the most likely."""
        return (self.top_baseline == self.token) != (self.top == self.token)

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

    def result(self, model: str, baseline: str, tokenizer: Any = None) -> dict[str, Any]:
        """The content of eval.json. `tokenizer` writes the worst tokens out; without it they are shown by their ids."""
        return {
            "schema": 1,
            "kind": "eval",
            "model": model,
            "baseline": baseline,
            "text": self.windows.describe(),
            "metrics": self.metrics,
            "noise_floor": self.noise_floor,
            "by_position": breakdown.by_position(self.scores),
            "by_confidence": breakdown.by_confidence(self.scores),
            "kl_histogram": breakdown.kl_histogram(self.scores.kl),
            "worst": breakdown.worst(self.scores, self.windows.ids, tokenizer),
            "self_generated": self.windows.self_generated,
            "seconds": round(self.seconds, 3),
            "confidence": bootstrap.CONFIDENCE,
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
        "flips": scores.flips,
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
        "flips": metric("flips"),
        "loglik_gap": metric("gap"),
    }
    drawn = bootstrap.quantile_replicates(scores.kl, unit, counts, tuple(QUANTILES.values()))
    for i, (name, q) in enumerate(QUANTILES.items()):
        found[name] = bootstrap.interval(drawn[:, i], bootstrap.quantile(scores.kl, q))
    return found


def write_result(directory: Path | str, fidelity: Fidelity, model: str, baseline: str, tokenizer: Any = None) -> Path:
    """Write eval.json (whole or not at all) into `directory`; returns its path."""
    path = Path(directory) / EVAL
    make_directory(path.parent)
    write_json(path, fidelity.result(model, baseline, tokenizer))
    return path


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
