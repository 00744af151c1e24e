"""Has a text run into a loop? A piece of up to 64 tokens, three times or more on the spot, over 32 tokens at least.

With x the tokens, x[i] == x[i - p] for r tokens in a row means that a piece of p tokens is there (r + p) / p times.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

LONGEST_PIECE = 64
COPIES = 3
FEWEST_TOKENS = 32
"""Shorter runs are what honest text has: a rule of dashes, a row of a table, a refrain."""


def loops(tokens: Sequence[Hashable]) -> bool:
    """Whether a piece of p <= LONGEST_PIECE tokens is repeated on the spot COPIES times, over FEWEST_TOKENS or more."""
    return any(longest_run(tokens, p) >= needed(p) for p in range(1, min(LONGEST_PIECE, len(tokens) - 1) + 1))


def needed(period: int) -> int:
    """How many tokens in a row must equal those `period` before them."""
    return max((COPIES - 1) * period, FEWEST_TOKENS - period)


def longest_run(tokens: Sequence[Hashable], period: int) -> int:
    """The most tokens in a row that each equal the one `period` before it."""
    longest = run = 0
    for now, before in zip(tokens[period:], tokens):
        run = run + 1 if now == before else 0
        longest = max(longest, run)
    return longest
