"""Tokenized documents fitted to wanted lengths, so that sources give their shares and lengths stay mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.calibration.cut import MIN_TOKENS, too_few


@dataclass(frozen=True)
class Piece:
    """A sequence, and which document of which source it is a part of."""

    source: int
    document: int
    ids: np.ndarray


def fit(
    pools: Sequence[Sequence[np.ndarray]], shares: Sequence[float], lengths: Sequence[int], max_tokens: int
) -> list[Piece]:
    """Sequences of about `lengths` tokens: sum(lengths) in all, of each source its share where it has so many.

    pools       token ids of each source's documents, in the order in which they are to be used.
    shares      each source's share of the tokens; what a short source cannot give, the others do.
    A length takes the first document that is as long, from its beginning; the rest of it goes to the end of the
    queue. Where none is as long, the longest is taken whole and, in the end, further ones until the tokens are there.
    Raises HalfbyteError with both numbers when there is too little text.
    """
    budget = sum(lengths)
    room = [sum(len(ids) for ids in pool) for pool in pools]
    quotas = _quotas(budget, shares, room)
    shelves = [_Shelf(source, pool) for source, pool in enumerate(pools)]
    missing = list(quotas)
    found: list[Piece] = []

    def take(source: int, target: int) -> bool:
        piece = shelves[source].take(target)
        if piece is not None:
            found.append(piece)
            missing[source] -= len(piece.ids)
        return piece is not None

    for source, targets in enumerate(_deal(lengths, quotas)):
        for target in sorted(targets, reverse=True):
            take(source, target)
    open_sources = set(range(len(pools)))
    while open_sources and (left := budget - sum(len(piece.ids) for piece in found)) > 0:
        source = max(sorted(open_sources), key=lambda one: missing[one])
        if not take(source, min(max_tokens, max(MIN_TOKENS, left))):
            open_sources.remove(source)
    taken = sum(len(piece.ids) for piece in found)
    if taken < budget:
        raise too_few(taken, budget)
    return found


class _Shelf:
    """One source's documents, used up from the front; rests are put at the back."""

    def __init__(self, source: int, pool: Sequence[np.ndarray]) -> None:
        self.source = source
        self.ids, self.owners = list(pool), list(range(len(pool)))
        self.lengths = np.array([len(ids) for ids in pool], dtype=np.int64)

    def take(self, target: int) -> Piece | None:
        """A sequence of `target` tokens or, where no document has so many, the longest; None when all is used."""
        if not len(self.lengths):
            return None
        enough = self.lengths >= target
        at = int(enough.argmax() if enough.any() else self.lengths.argmax())
        if self.lengths[at] < MIN_TOKENS:
            return None
        ids, owner = self.ids[at], self.owners[at]
        self.ids[at], self.lengths[at] = ids[:0], 0
        rest = ids[target:]
        if len(rest) >= MIN_TOKENS:
            self.ids.append(rest)
            self.owners.append(owner)
            self.lengths = np.append(self.lengths, len(rest))
        return Piece(self.source, owner, ids[:target])


def _quotas(budget: int, shares: Sequence[float], room: Sequence[int]) -> list[float]:
    """Tokens that each source gives: its share, or all it has; what is missing falls to the others by their shares."""
    quotas = [0.0] * len(room)
    left, able = float(budget), {i for i in range(len(room)) if room[i] > 0}
    while able and left > 0.5:
        total = sum(shares[i] for i in sorted(able))
        given = {i: min(left * shares[i] / total, room[i] - quotas[i]) for i in sorted(able)}
        for source, tokens in given.items():
            quotas[source] += tokens
        left -= sum(given.values())
        able = {i for i in able if room[i] - quotas[i] > 0.5}
    return quotas


def _deal(lengths: Sequence[int], quotas: Sequence[float]) -> list[list[int]]:
    """Each length to the source that has the most left to give."""
    dealt: list[list[int]] = [[] for _ in quotas]
    left = list(quotas)
    for length in lengths:
        source = max(range(len(left)), key=lambda one: left[one])
        dealt[source].append(length)
        left[source] -= length
    return dealt
