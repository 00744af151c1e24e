"""Long contexts: synthetic retrieval and perplexity by position, BF16 against 4 bits and a 16-bit against an FP8 KV
cache, as long_context.json. How the two drift apart over the length is the question, so the figures are curves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate import bootstrap
from halfbyte.evaluate.curves import Run, by_length, perplexity_rows, ppl_drift, retrieval_drift, retrieval_rows
from halfbyte.evaluate.haystack import CANDIDATES, DEEP, STORIES, Item, answer_words, make_item
from halfbyte.evaluate.pair import LABELS, URL, Pair, Side
from halfbyte.evaluate.windows import Windows, text_windows
from halfbyte.files import make_directory, write_json
from halfbyte.types import Progress, Quiet

LONG_CONTEXT = "long_context.json"
SHORTEST, LONGEST = 4096, 131_072
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 4
WINDOWS = 4


@dataclass(frozen=True)
class Condition:
    """A column of the result: which side, with which KV cache."""

    key: str
    side: Side
    kv_cache: str = "auto"


PLAIN = (Condition("bf16", "baseline"), Condition("4bit", "model"))
FP8 = (Condition("bf16+fp8kv", "baseline", "fp8"), Condition("4bit+fp8kv", "model", "fp8"))


def evaluate_long_context(
    pair: Pair,
    lengths: Sequence[int] | None = None,
    *,
    text: Sequence[Path | str] = (),
    portion: tuple[float, float] = (0.0, 1.0),
    tasks: Sequence[str] = tuple(STORIES),
    depths: Sequence[float] = DEPTHS,
    samples: int = SAMPLES,
    windows: int = WINDOWS,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Retrieval at each length and perplexity by position in the longest; the content of long_context.json.

    lengths   tokens, answer included; None: 4096 and its doubles up to what the model allows (131,072 at most)
    text      files of real text for the perplexity; without one, none is measured. portion: the part of it that counts
    samples   prompts for each task, length and depth; windows: pieces of the text, as long as the longest length
    Raises UsageError for impossible lengths, HalfbyteError when a model gives NaN or does not fit.
    """
    progress, started = progress or Quiet(), time.monotonic()
    lengths = _lengths(lengths, pair.context())
    words = answer_words(pair.tokenizer)
    progress.start("making long prompts", len(lengths))
    items: list[Item] = []
    for length in lengths:
        for task in tasks:
            for depth in depths if task in DEEP else (None,):
                items += [make_item(pair.tokenizer, words, task, length, depth, seed + i) for i in range(samples)]
        progress.advance()
    pieces = _windows(text, portion, pair.tokenizer, lengths, windows, progress) if text else None
    conditions, missing = _conditions(pair)
    runs = [_run(pair, c, items, words.tokens, pieces, lengths[-1], progress) for c in PLAIN]
    for condition in conditions:
        try:
            runs.append(_run(pair, condition, items, words.tokens, pieces, lengths[-1], progress))
        except HalfbyteError as error:
            missing[condition.key] = str(error)
    return {
        **pair.header("long_context"),
        "confidence": bootstrap.CONFIDENCE,
        "lengths": lengths,
        "candidates": CANDIDATES,
        "samples": samples,
        "retrieval": retrieval_rows(items, runs, seed),
        "by_length": by_length(items, runs, seed),
        "drift": retrieval_drift(items, runs, seed),
        "text": pieces.describe() if pieces else None,
        "perplexity": perplexity_rows(runs, seed) if pieces else [],
        "ppl_drift": ppl_drift(runs, seed) if pieces else {},
        "not_measured": missing,
        "seconds": round(time.monotonic() - started, 3),
    }


def write_long_context(directory: Path | str, result: dict[str, Any]) -> Path:
    """Write long_context.json (whole or not at all) into `directory`; returns its path."""
    path = Path(directory) / LONG_CONTEXT
    make_directory(path.parent)
    write_json(path, result)
    return path


def _lengths(asked: Sequence[int] | None, limit: int | None) -> list[int]:
    """Ascending lengths within the model's positions."""
    most = limit or LONGEST
    if asked:
        if max(asked) > most:
            raise UsageError(f"the model has {most} positions: {max(asked)} tokens are too long")
        return sorted(set(asked))
    doubled = [SHORTEST << i for i in range(32) if SHORTEST << i <= min(most, LONGEST)]
    return doubled or [most]


def _windows(
    text: Sequence[Path | str],
    portion: tuple[float, float],
    tokenizer: Any,
    lengths: list[int],
    count: int,
    progress: Progress,
) -> Windows:
    """Pieces of the text of the longest length that it gives; told where that is not the longest of all."""
    for length in reversed(lengths):
        try:
            found = text_windows(list(text), tokenizer, window=length - 1, portion=portion).first(count)
        except HalfbyteError:
            if length == lengths[0]:
                raise
            progress.say(f"the text is too short for {length} tokens: perplexity is measured at a smaller length")
            continue
        if len(found) < count:
            progress.say(f"the text gives {len(found)} pieces of {length} tokens, not {count}")
        return found
    raise AssertionError("unreachable")


def _conditions(pair: Pair) -> tuple[list[Condition], dict[str, str]]:
    """What is tried beside PLAIN, and why the rest is not measured."""
    if pair.serving is None:
        reason = "transformers keeps keys and values in the model's own 16 bits: serve with vLLM to measure FP8"
    elif any(str(side).startswith(URL) for side in (pair.baseline, pair.model)):
        reason = "the servers run already: how they keep keys and values is theirs to say"
    else:
        return list(FP8), {}
    return [], {condition.key: reason for condition in FP8}


def _run(
    pair: Pair,
    condition: Condition,
    items: Sequence[Item],
    candidates: Sequence[int],
    windows: Windows | None,
    longest: int,
    progress: Progress,
) -> Run:
    label = f"{LABELS[condition.side]}, KV cache {condition.kv_cache}"
    with pair.open(condition.side, longest, progress, condition.kv_cache) as subject:
        progress.start(f"retrieval, {label}", len(items))
        chosen = subject.choose([item.ids for item in items], candidates, progress)
        logliks: list[np.ndarray] = []
        if windows:
            progress.start(f"long text, {label}", len(windows))
            logliks = subject.logliks([ids.tolist() for ids in windows.ids], progress)
    if any(np.isnan(values).any() for values in logliks):
        raise HalfbyteError(f"{label} gives NaN on long text: run `halfbyte check` on the artifact")
    right = np.array([token == item.answer for token, item in zip(chosen, items)], dtype=np.float64)
    return Run(condition.key, right, logliks)
