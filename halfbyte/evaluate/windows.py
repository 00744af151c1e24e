"""What fidelity is measured on: windows of a text's token stream, or sequences that a model wrote itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.calibration import CalibrationSet, leading_special, read_documents, text_ids
from halfbyte.calibration.store import tokens_sha256
from halfbyte.calibration.tokens import Tokenizer
from halfbyte.errors import HalfbyteError, UsageError

SHORTEST = 256
"""Tokens of the shortest windows of mixed lengths."""
MIXED_TOKENS = 50_000


@dataclass(frozen=True)
class Windows:
    """Token sequences with a mask of the tokens that count.

    ids         int64 [T] each.
    scored      bool [T] each: whose log-likelihood counts. Never the first token of a window.
    window      tokens of the longest sequence; stride: tokens from one window's start to the next.
    """

    ids: list[torch.Tensor]
    scored: list[torch.Tensor]
    source: str
    window: int
    stride: int
    self_generated: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens that are scored."""
        return int(sum(mask.sum() for mask in self.scored))

    @property
    def sha256(self) -> str:
        """SHA-256 of the tokens."""
        return tokens_sha256(self.ids)

    def first(self, count: int) -> Windows:
        """The first `count` windows alone."""
        return Windows(
            self.ids[:count], self.scored[:count], self.source, self.window, self.stride, self.self_generated
        )

    def describe(self) -> dict[str, Any]:
        """The facts that eval.json states about the text."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "windows": len(self),
            "window": self.window,
            "stride": self.stride,
            "tokens": self.tokens,
        }


def text_windows(
    paths: Sequence[Path | str] | Path | str,
    tokenizer: Tokenizer,
    *,
    window: int = 512,
    stride: int | None = None,
    count: int | None = None,
    portion: tuple[float, float] = (0.0, 1.0),
) -> Windows:
    """The first `count` (default: all whole) windows of the token stream of text or JSONL files.

    The files are tokenized once, as one text, with no special tokens; where the tokenizer itself would begin a text
    with some (a BOS), every window begins with them. With a stride below the window, windows overlap and
    only their last `stride` tokens are scored, so that no token counts twice.
    Raises UsageError for impossible sizes, HalfbyteError when the text has too few tokens.
    """
    step = window if stride is None else stride
    if window < 2 or not 1 <= step <= window:
        raise UsageError(f"window {window} and stride {step} do not fit: use 1 <= stride <= window, window >= 2")
    names, stream, head = _stream(paths, tokenizer, portion)
    body = window - len(head)
    if body < 1:
        raise UsageError(f"window {window} leaves no room for text: use a longer one")
    step = min(step, body)
    whole = (len(stream) - body) // step + 1 if len(stream) >= body else 0
    wanted = whole if count is None else count
    if wanted < 1 or wanted > whole:
        need = body + (max(1, wanted) - 1) * step
        raise HalfbyteError(
            f"too few tokens to evaluate on: the text gives {len(stream):,}, {max(1, wanted)} windows of {window} "
            f"need {need:,}: give more text or fewer windows"
        )
    ids, scored = [], []
    for index in range(wanted):
        piece = stream[index * step : index * step + body]
        ids.append(torch.tensor(head + piece))
        mask = torch.ones(window, dtype=torch.bool)
        mask[: max(1, len(head)) if index == 0 else max(1, window - step)] = False
        scored.append(mask)
    return Windows(ids, scored, names, window, step)


def mixed_windows(
    paths: Sequence[Path | str] | Path | str, tokenizer: Tokenizer, *, tokens: int = MIXED_TOKENS, longest: int
) -> Windows:
    """About `tokens` tokens of the token stream of text or JSONL files in windows of lengths that double, up to
    `longest` where so many tokens allow for that; each length has the same share of the tokens (`doubling`).

    The windows follow each other in the stream, short ones first; every token but their first is scored.
    Raises UsageError for impossible sizes, HalfbyteError when the text has too few tokens.
    """
    names, stream, head = _stream(paths, tokenizer, (0.0, 1.0))
    lengths = doubling(tokens, longest)
    need = sum(lengths) - len(lengths) * len(head)
    if len(stream) < need:
        raise HalfbyteError(
            f"too few tokens to evaluate on: the text gives {len(stream):,}, {len(lengths)} windows of up to "
            f"{lengths[-1]} tokens need {need:,}: give more text, or fewer --tokens"
        )
    ids, scored, at = [], [], 0
    for length in lengths:
        body = length - len(head)
        ids.append(torch.tensor(head + stream[at : at + body]))
        scored.append(torch.arange(length) >= max(1, len(head)))
        at += body
    return Windows(ids, scored, names, lengths[-1], lengths[-1])


def doubling(tokens: int, longest: int) -> list[int]:
    """Window lengths, ascending, that sum up to about `tokens`: SHORTEST and its doubles up to `longest`, each with the
    same share of the tokens, and no length that its share would not fill once."""
    if longest < 2 or tokens < 2:
        raise UsageError(f"{tokens} tokens in windows of up to {longest} do not fit: both must be 2 or more")
    classes = [min(SHORTEST, longest, tokens)]
    while classes[-1] < longest and min(2 * classes[-1], longest) * (len(classes) + 1) <= tokens:
        classes.append(min(2 * classes[-1], longest))
    share = tokens // len(classes)
    return [length for length in classes for _ in range(max(1, round(share / length)))]


def set_windows(written: CalibrationSet, *, source: str = "self-generated", start: int = 0) -> Windows:
    """The sequences of a calibration set, from the `start`-th on; only tokens that the model sampled are scored."""
    ids = written.sequences[start:]
    if not ids:
        raise HalfbyteError(f"no sequence to evaluate on: the set has {len(written.sequences)}, all before {start}")
    masks = written.sampled[start:] if written.sampled is not None else [torch.ones_like(s).bool() for s in ids]
    scored = []
    for mask in masks:
        kept = mask.clone()
        kept[0] = False
        scored.append(kept)
    longest = max(len(sequence) for sequence in ids)
    return Windows(list(ids), scored, source, longest, longest, written.sampled is not None)


def batches(windows: Windows, batch_tokens: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Indices and right-padded ids [B, T] of windows of like length, at most `batch_tokens` with the padding.

    Padding on the right needs no mask in a causal model: no scored token looks at it.
    """
    order = sorted(range(len(windows)), key=lambda i: -len(windows.ids[i]))
    at = 0
    while at < len(order):
        longest = len(windows.ids[order[at]])
        members = order[at : at + max(1, batch_tokens // longest)]
        padded = torch.zeros(len(members), longest, dtype=torch.int64)
        for row, index in enumerate(members):
            padded[row, : len(windows.ids[index])] = windows.ids[index]
        yield members, padded
        at += len(members)


def _stream(
    paths: Sequence[Path | str] | Path | str, tokenizer: Tokenizer, portion: tuple[float, float]
) -> tuple[str, list[int], list[int]]:
    """The files' names, their token stream as one text, and what the tokenizer puts before a text."""
    files = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    documents = read_documents(files, tokenizer, portion)
    stream = text_ids(tokenizer, ["".join(document.text for document in documents)])[0]
    return ", ".join(path.name for path in files), stream, leading_special(tokenizer)
