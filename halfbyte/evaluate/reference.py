"""The BF16 side of the comparison, computed once for any number of quantized models.

What is kept is not the logits but what the model's head reads: a hidden state for each scored token, in the model's own
dtype, and the head itself. The logits come from them by one matrix product, the very one that the model does, so that
nothing is lost: 1,152 bytes a token for SmolLM2-135M instead of 98,304, 8 KiB instead of 250 for Llama-3-8B.

On disk: reference.safetensors (the tokens and which of them count, `hidden` [N, D] in the order of the batches, the
head) and reference.json, last. Comparing with it gives the very figures of `compare`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.fidelity import Fidelity, TokenScores, collected, enough, summary
from halfbyte.evaluate.scoring import Head, hidden_of, hidden_statistics, scored_positions
from halfbyte.evaluate.windows import Windows, batches
from halfbyte.files import make_directory, write_json, write_tensors
from halfbyte.models.checkpoint import read_json
from halfbyte.types import Progress, Quiet

TENSORS, RESULT = "reference.safetensors", "reference.json"
BATCH_TOKENS = 1024
NOISE_TOKENS = 2048
"""Tokens that the noise floor is measured on."""
VERSION = 2
"""Raised whenever what is kept changes its form."""


@dataclass(frozen=True)
class Reference:
    """A baseline on windows: `hidden` [N, D] of every scored token, batch by batch, and the head that reads them.

    facts   reference.json: key, batch_tokens, vocabulary, bytes, noise_floor, text
    """

    windows: Windows
    hidden: torch.Tensor
    head: Head
    facts: dict[str, Any]

    def save(self, directory: Path) -> None:
        """Into an empty or missing directory; raises HalfbyteError where the disk refuses."""
        windows = self.windows
        tensors = {
            "ids": torch.cat(windows.ids),
            "scored": torch.cat(windows.scored).to(torch.uint8),
            "lengths": torch.tensor([len(ids) for ids in windows.ids]),
            "hidden": self.hidden,
            "weight": self.head.weight.data,
        }
        if self.head.bias is not None:
            tensors["bias"] = self.head.bias.data
        write_tensors(make_directory(directory) / TENSORS, tensors)
        write_json(directory / RESULT, {**self.facts, "cap": self.head.cap})

    @classmethod
    def load(cls, directory: Path) -> Reference:
        """Read it back; raises HalfbyteError where the directory holds no whole reference."""
        facts = read_json(directory / RESULT)
        try:
            found = load_file(directory / TENSORS)
            lengths = found["lengths"].tolist()
            ids, scored = list(found["ids"].split(lengths)), list(found["scored"].bool().split(lengths))
            head = Head(found["weight"], found.get("bias"), facts["cap"])
            return cls(Windows(ids, scored, **facts["text"]), found["hidden"], head, facts)
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise HalfbyteError(f"{directory} holds no whole reference: run the same command again") from error


def reference_key(
    windows: Windows, model: str, batch_tokens: int = BATCH_TOKENS, noise_tokens: int = NOISE_TOKENS
) -> str:
    """What names a reference: the tokens, which of them count, the model, the batches."""
    masks = hashlib.sha256(torch.cat(windows.scored).numpy().tobytes()).hexdigest()
    parts = [VERSION, model, windows.sha256, masks, windows.describe(), batch_tokens, noise_tokens]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def reference_of(
    baseline: Any,
    windows: Windows,
    *,
    batch_tokens: int = BATCH_TOKENS,
    noise_tokens: int = NOISE_TOKENS,
    key: str = "",
    progress: Progress | None = None,
) -> Reference:
    """Run `baseline` (a transformers causal LM in eval mode) on `windows`.

    batch_tokens    tokens a batch, padding included.
    noise_tokens    how many tokens' windows the noise floor takes (two runs of the baseline more for these).
    """
    progress = progress or Quiet()
    progress.start("running the BF16 model, once for all", len(windows))
    parts = []
    for members, ids, row, position in _scored_batches(windows, batch_tokens):
        if len(row):
            parts.append(hidden_of(baseline, ids)[row, position - 1].cpu())
        progress.advance(len(members))
    if not parts:
        raise HalfbyteError("no token to score: give longer windows")
    noise = noise_floor(baseline, windows.first(enough(windows, noise_tokens)), batch_tokens, progress)
    head, hidden = Head.of(baseline).to("cpu"), torch.cat(parts)
    text = {"source": windows.source, "window": windows.window, "stride": windows.stride}
    size = sum(tensor.numel() * tensor.element_size() for tensor in (hidden, head.weight))
    facts = {"schema": 1, "kind": "reference", "key": key, "batch_tokens": batch_tokens, "noise_floor": noise}
    facts |= {"bytes": size, "vocabulary": len(head.weight)}
    return Reference(windows, hidden, head, {**facts, "text": {**text, "self_generated": windows.self_generated}})


def make_reference(
    directory: Path,
    load: Callable[[], Any],
    windows: Windows,
    model: str,
    *,
    batch_tokens: int = BATCH_TOKENS,
    noise_tokens: int = NOISE_TOKENS,
    progress: Progress | None = None,
) -> Reference:
    """The reference of `windows` in `directory`: the one that is there, or a new one in its place.

    load    gives the BF16 model (a transformers causal LM in eval mode); called only where there is work
    model   names it (its fingerprint and where it runs): part of the key under which the reference is found again
    """
    key = reference_key(windows, model, batch_tokens, noise_tokens)
    there = found(directory, key)
    if there is not None:
        return there
    shutil.rmtree(directory, ignore_errors=True)
    made = reference_of(
        load(), windows, batch_tokens=batch_tokens, noise_tokens=noise_tokens, key=key, progress=progress
    )
    made.save(directory)
    return made


def found(directory: Path, key: str) -> Reference | None:
    """The whole reference that a directory holds under this key, if it does."""
    try:
        if (directory / RESULT).is_file() and read_json(directory / RESULT).get("key") == key:
            return Reference.load(directory)
    except HalfbyteError:
        pass  # damaged: it is made again
    return None


def compare_with_reference(
    reference: Reference,
    model: Any,
    *,
    progress: Progress | None = None,
    seed: int = 0,
    label: str = "comparing with the baseline",
) -> Fidelity:
    """What `compare` gives for the reference's BF16 model and `model`, on the reference's windows.

    label   what the progress calls it
    Raises HalfbyteError when the vocabularies differ or the model gives NaN.
    """
    progress, windows, started = progress or Quiet(), reference.windows, time.monotonic()
    progress.start(label, len(windows))
    p, q = reference.head.to(model.device), Head.of(model)
    columns, at = _columns(), 0
    for members, ids, row, position in _scored_batches(windows, reference.facts["batch_tokens"]):
        if len(row):
            hp = reference.hidden[at : at + len(row)].to(model.device)
            hq = hidden_of(model, ids)[row, position - 1]
            _add(columns, hidden_statistics(p, hp, q, hq, ids[row, position]), members, row, position)
            at += len(row)
        progress.advance(len(members))
    scores = collected(columns)
    noise = reference.facts["noise_floor"]
    return Fidelity(scores, summary(scores, seed), noise, windows, time.monotonic() - started)


def compare(
    baseline: Any,
    model: Any,
    windows: Windows,
    *,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
    seed: int = 0,
    noise_tokens: int = NOISE_TOKENS,
) -> Fidelity:
    """Score `model` against `baseline` (transformers causal LMs in eval mode, one vocabulary) on `windows`.

    Raises HalfbyteError when the vocabularies differ or a model gives NaN.
    """
    started = time.monotonic()
    reference = reference_of(baseline, windows, batch_tokens=batch_tokens, noise_tokens=noise_tokens, progress=progress)
    done = compare_with_reference(reference, model, progress=progress, seed=seed)
    return Fidelity(done.scores, done.metrics, done.noise_floor, windows, time.monotonic() - started)


def noise_floor(
    baseline: Any, windows: Windows, batch_tokens: int = BATCH_TOKENS, progress: Progress | None = None
) -> dict[str, Any]:
    """The baseline against itself: whole windows in batches, and each alone in two pieces through the KV cache."""
    progress = progress or Quiet()
    progress.start("measuring the noise floor", len(windows))
    head, columns = Head.of(baseline), _columns()
    for members, ids, row, position in _scored_batches(windows, batch_tokens):
        if len(row):
            hp, hq = (hidden[row, position - 1] for hidden in (hidden_of(baseline, ids), _alone(baseline, ids)))
            _add(columns, hidden_statistics(head, hp, head, hq, ids[row, position]), members, row, position)
        progress.advance(len(members))
    scores = collected(columns)
    gap = scores.loglik_baseline.astype(np.float64) - scores.loglik
    return {
        "kl_mean": float(scores.kl.mean(dtype=np.float64)),
        "top1": float(scores.top1.mean()),
        "ppl_ratio": float(np.exp(gap.mean())),
        "how": f"baseline against itself on {len(windows)} windows: batched whole, and alone in two pieces "
        "through the key-value cache",
    }


def window_sums(scores: TokenScores) -> dict[str, list[float]]:
    """Per scored window, in order: tokens, and the sums over them of KL and of the log-likelihood lost (nats).

    They are all that a bootstrap over windows needs to compare two models that were scored on the same windows.
    """
    unit = np.unique(scores.window, return_inverse=True)[1]
    gap = scores.loglik_baseline.astype(np.float64) - scores.loglik
    return {
        "tokens": np.bincount(unit).tolist(),
        "kl": np.bincount(unit, weights=scores.kl).tolist(),
        "gap": np.bincount(unit, weights=gap).tolist(),
    }


def _scored_batches(
    windows: Windows, batch_tokens: int
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches as `batches` gives them, with row and position of the tokens that count."""
    for members, ids in batches(windows, batch_tokens):
        yield members, ids, *scored_positions(windows, members, ids.shape[1])


def _columns() -> dict[str, list[np.ndarray]]:
    return {name: [] for name in TokenScores.__dataclass_fields__}


def _add(
    columns: dict[str, list[np.ndarray]],
    statistics: dict[str, torch.Tensor],
    members: list[int],
    row: torch.Tensor,
    position: torch.Tensor,
) -> None:
    for name, values in {**statistics, "window": torch.tensor(members)[row], "position": position}.items():
        columns[name].append(values.numpy())


def _alone(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What the head reads of each row by itself, in two pieces of uneven length."""
    split = max(1, ids.shape[1] * 2 // 5) if ids.shape[1] > 1 else 0
    return torch.cat([hidden_of(model, one.unsqueeze(0), split) for one in ids])
