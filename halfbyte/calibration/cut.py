"""Tokens cut into calibration sequences: mixed lengths from anywhere in the text, or even strides of one stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from halfbyte.errors import HalfbyteError

MIN_TOKENS = 16
"""Shorter pieces teach nothing and are left out."""


def mixed_lengths(sequences: int, max_tokens: int, seed: int) -> list[int]:
    """Target lengths: half of them max_tokens, half spread evenly from max_tokens / 8 up to it; shuffled."""
    shortest = min(max_tokens, max(MIN_TOKENS, max_tokens // 8))
    spread = np.linspace(shortest, max_tokens, sequences // 2 + 1)[:-1].round().astype(int)
    lengths = np.concatenate([np.full(sequences - len(spread), max_tokens), spread])
    return [int(n) for n in np.random.default_rng([seed, 1]).permutation(lengths)]


def cut_stream(ids: Sequence[int], sequences: int, max_tokens: int) -> list[list[int]]:
    """`sequences` pieces of exactly max_tokens at even strides of one token stream, first to last token."""
    if len(ids) < sequences * max_tokens:
        raise too_few(len(ids), sequences * max_tokens)
    last = len(ids) - max_tokens
    starts = [i * last // max(1, sequences - 1) for i in range(sequences)]
    return [list(ids[start : start + max_tokens]) for start in starts]


def cut_mixed(
    pieces: Sequence[Sequence[int]], continues: Sequence[bool], lengths: Sequence[int], max_tokens: int, seed: int
) -> list[list[int]]:
    """Sequences that start at document or paragraph boundaries, in random order, no token used twice.

    pieces, continues   token ids of each document; continues[i]: piece i may be joined to piece i - 1.
    lengths             what is wanted, as `mixed_lengths` gives it. A document that may not be joined and ends
                        early gives a shorter sequence; more are then taken until sum(lengths) tokens are there.
    Raises HalfbyteError with both numbers when the text is too short.
    """
    store, joins = _split_long(pieces, continues, max_tokens)
    starts = deque(int(i) for i in np.random.default_rng([seed, 2]).permutation(len(store)))
    wanted, taken = deque(lengths), 0
    budget = sum(lengths)
    found: list[list[int]] = []
    while starts and (wanted or taken < budget):
        start = starts.popleft()
        target = wanted[0] if wanted else min(max_tokens, max(MIN_TOKENS, budget - taken))
        sequence = _take(store, joins, start, target, starts)
        if len(sequence) < MIN_TOKENS:
            continue
        found.append(sequence)
        taken += len(sequence)
        if wanted:
            wanted.popleft()
    if taken < budget:
        raise too_few(taken, budget)
    return found


def too_few(found: int, needed: int) -> HalfbyteError:
    """The error for a text that is too short: both numbers, and what to do."""
    return HalfbyteError(
        f"too few calibration tokens: the text gives {found:,}, {needed:,} are asked for: "
        "add text, or ask for less with --sequences or --max-tokens (quantize, run: --set calibration.sequences=N)"
    )


def _split_long(
    pieces: Sequence[Sequence[int]], continues: Sequence[bool], max_tokens: int
) -> tuple[list[list[int]], list[bool]]:
    store: list[list[int]] = []
    joins: list[bool] = []
    for ids, joined in zip(pieces, continues, strict=True):
        for start in range(0, max(1, len(ids)), max_tokens):
            store.append(list(ids[start : start + max_tokens]))
            joins.append(joined if start == 0 else True)
    return store, joins


def _take(store: list[list[int]], joins: list[bool], start: int, target: int, starts: deque[int]) -> list[int]:
    """Use up `store` from `start` on, up to `target` tokens; a rest is put back as a new start."""
    sequence: list[int] = []
    i = start
    while i < len(store) and len(sequence) < target and (i == start or (joins[i] and store[i])):
        room = target - len(sequence)
        sequence += store[i][:room]
        rest = store[i][room:]
        store[i] = rest
        if rest:
            joins[i] = False
            if i != start or len(rest) >= MIN_TOKENS:
                starts.append(i)
        i += 1
    return sequence
