"""Fidelity of an artifact from places alone: which text, BF16's side from the cache, the 4-bit model against it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from halfbyte.artifact import load_fake_quantized
from halfbyte.errors import UsageError
from halfbyte.evaluate import (
    Fidelity,
    Windows,
    cached_reference,
    compare_with_reference,
    mixed_windows,
    set_windows,
    text_windows,
)
from halfbyte.evaluate.windows import MIXED_TOKENS
from halfbyte.experiments.quantize import self_generated
from halfbyte.models import Checkpoint
from halfbyte.models.library import load_model, load_tokenizer
from halfbyte.recipe import CalibrationSpec
from halfbyte.types import Progress

OWN_WINDOWS, OWN_LENGTH = 64, 256
MIXED = "mixed"
MEAN_LENGTH = 25 / 32
"""Of the longest: the mean length of a set of mixed lengths."""


def measure_fidelity(
    artifact: Path, path: Path, windows: Windows, device: str = "cpu", progress: Progress | None = None
) -> Fidelity:
    """The artifact against the BF16 model in `path`, which runs only where the cache has nothing of it."""
    fingerprint = Checkpoint(path).fingerprint()
    reference = cached_reference(lambda: load_model(path, device), windows, fingerprint, device, progress=progress)
    return compare_with_reference(reference, load_fake_quantized(artifact, device=device), progress=progress)


def choose_windows(
    path: Path,
    text: Sequence[Path] = (),
    *,
    window: int = 512,
    stride: int | None = None,
    count: int | None = None,
    tokens: int | None = None,
    lengths: str | None = None,
    seed: int = 1,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Windows:
    """What the model in `path` is judged on: windows of `text`, or what the model writes where there is none.

    window, stride, count   as for `text_windows`; of the model's own text, `count` sequences
    tokens                  about so many tokens instead of `count` windows
    lengths                 "mixed": windows that double up to the model's context (`mixed_windows`); "N": of N tokens
    Raises UsageError where they contradict each other.
    """
    if tokens is not None and count is not None:
        raise UsageError("--tokens and --windows both say how much: give one of them")
    mixed, fixed = lengths == MIXED, None if lengths in (None, MIXED) else _length(str(lengths))
    if not text:
        longest = fixed or OWN_LENGTH
        sequences = count or (OWN_WINDOWS if tokens is None else math.ceil(tokens / (MEAN_LENGTH * longest)))
        spec = CalibrationSpec(sequences=sequences, max_tokens=longest, seed=seed)
        return set_windows(self_generated(path, spec, device, progress))
    tokenizer = load_tokenizer(path)
    if mixed:
        if stride is not None or count is not None:
            raise UsageError("--lengths mixed cuts the text itself: say how much with --tokens")
        return mixed_windows(list(text), tokenizer, tokens=tokens or MIXED_TOKENS, longest=_context(path))
    size = fixed or window
    limit = Checkpoint(path).config.get("max_position_embeddings")
    if type(limit) is int and size > limit:
        raise UsageError(f"windows of {size} tokens are asked for, and the model takes {limit}: use --window {limit}")
    if tokens is not None:
        count = max(1, round(tokens / (stride or size)))
        return text_windows(list(text), tokenizer, window=size, stride=stride, count=count)
    windows = text_windows(list(text), tokenizer, window=size, stride=stride)
    return windows if count is None else windows.first(count)


def _length(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise UsageError(f"--lengths {text}: write mixed, or a number of tokens from 2 on")
    return int(text)


def _context(path: Path) -> int:
    """The longest sequence that the model takes, in tokens."""
    found = Checkpoint(path).config.get("max_position_embeddings")
    if type(found) is not int or found < 2:
        raise UsageError(f"{path}/config.json does not say how long a sequence may be: name --lengths N")
    return found
