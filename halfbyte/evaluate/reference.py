"""The BF16 side of the comparison, computed once and kept on disk for any number of quantized models.

A directory: windows.safetensors (the tokens and which of them count), batch-NNNNN.safetensors (`logits`, one row of
the vocabulary for each scored token, in the model's own dtype, so that nothing is lost), and reference.json, last.
It takes scored tokens x vocabulary x 2 bytes. Comparing with it gives the very figures of `compare`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.fidelity import NOISE_TOKENS, Fidelity, TokenScores, collected, enough, noise_floor, summary
from halfbyte.evaluate.scoring import logits_of, pair_statistics, scored_positions
from halfbyte.evaluate.windows import Windows, batches
from halfbyte.files import make_directory, write_json, write_tensors
from halfbyte.models.checkpoint import read_json
from halfbyte.types import Progress, Quiet

RESULT = "reference.json"
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Reference:
    """A reference on disk. `facts`: reference.json (key, batch_tokens, batches, noise_floor, vocabulary, bytes)."""

    directory: Path
    windows: Windows
    facts: dict[str, Any]

    @classmethod
    def load(cls, directory: Path) -> Reference:
        """Read windows and facts; raises HalfbyteError where the directory holds no whole reference."""
        facts = read_json(directory / RESULT)
        try:
            tensors = load_file(directory / "windows.safetensors")
        except (OSError, SafetensorError) as error:
            raise HalfbyteError(f"{directory} holds no whole reference: run the same command again") from error
        ids = list(tensors["ids"].split(tensors["lengths"].tolist()))
        scored = list(tensors["scored"].bool().split(tensors["lengths"].tolist()))
        windows = Windows(ids, scored, **facts["text"])
        return cls(directory, windows, facts)


def reference_key(
    windows: Windows, model: str, batch_tokens: int = BATCH_TOKENS, noise_tokens: int = NOISE_TOKENS
) -> str:
    """What names a reference: the tokens, which of them count, the model, the batches."""
    masks = hashlib.sha256(torch.cat(windows.scored).numpy().tobytes()).hexdigest()
    parts = [1, model, windows.sha256, masks, windows.describe(), batch_tokens, noise_tokens]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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
    if (directory / RESULT).is_file() and read_json(directory / RESULT).get("key") == key:
        return Reference.load(directory)
    shutil.rmtree(directory, ignore_errors=True)
    make_directory(directory)
    progress = progress or Quiet()
    baseline = load()
    progress.start("running the BF16 model, once for all", len(windows))
    count = size = vocabulary = 0
    for number, (members, ids) in enumerate(batches(windows, batch_tokens)):
        row, position = scored_positions(windows, members, ids.shape[1])
        rows = logits_of(baseline, ids)[row, position - 1]
        write_tensors(directory / _batch(number), {"logits": rows})
        count, size, vocabulary = number + 1, size + rows.numel() * rows.element_size(), rows.shape[-1]
        progress.advance(len(members))
    noise = noise_floor(baseline, windows.first(enough(windows, noise_tokens)), batch_tokens, progress)
    lengths = torch.tensor([len(ids) for ids in windows.ids])
    tensors = {"ids": torch.cat(windows.ids), "scored": torch.cat(windows.scored).to(torch.uint8), "lengths": lengths}
    write_tensors(directory / "windows.safetensors", tensors)
    text = {"source": windows.source, "window": windows.window, "stride": windows.stride}
    facts = {"schema": 1, "kind": "reference", "key": key, "batch_tokens": batch_tokens, "batches": count}
    facts |= {"bytes": size, "vocabulary": vocabulary, "noise_floor": noise}
    write_json(directory / RESULT, {**facts, "text": {**text, "self_generated": windows.self_generated}})
    return Reference.load(directory)


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
    columns: dict[str, list[np.ndarray]] = {name: [] for name in TokenScores.__dataclass_fields__}
    for number, (members, ids) in enumerate(batches(windows, reference.facts["batch_tokens"])):
        row, position = scored_positions(windows, members, ids.shape[1])
        if len(row):
            p = _rows(reference, number)
            q = logits_of(model, ids)[row, position - 1]
            for name, values in _statistics(p, q, ids[row, position]).items():
                columns[name].append(values.numpy())
            columns["window"].append(torch.tensor(members)[row].numpy())
            columns["position"].append(position.numpy())
        progress.advance(len(members))
    scores = collected(columns)
    noise = reference.facts["noise_floor"]
    return Fidelity(scores, summary(scores, seed), noise, windows, time.monotonic() - started)


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


def _statistics(p: torch.Tensor, q: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """pair_statistics of rows that are gathered already: p, q [N, V], the N tokens that they predict."""
    if p.shape != q.shape:
        raise HalfbyteError(
            f"the models have {p.shape[-1]} and {q.shape[-1]} tokens in their vocabularies: name the BF16 original"
        )
    position = torch.arange(1, len(tokens) + 1)
    ids = torch.cat([tokens.new_zeros(1), tokens])
    return pair_statistics(p[None], q[None], ids[None], torch.zeros_like(position), position)


def _rows(reference: Reference, number: int) -> torch.Tensor:
    file = reference.directory / _batch(number)
    try:
        return load_file(file)["logits"]
    except (OSError, SafetensorError, KeyError) as error:
        raise HalfbyteError(f"{file} is missing or damaged: delete its directory and run the same command") from error


def _batch(number: int) -> str:
    return f"batch-{number:05d}.safetensors"
