"""Repetition by definition against a second implementation; when 4 bits are worse than BF16, and when it is chance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from halfbyte.evaluate.repetition import COPIES, FEWEST_TOKENS, LONGEST_PIECE, loops
from halfbyte.evaluate.stability import facts_of, judge, length_ratio, more_than_chance


def naive(tokens: list[int]) -> bool:
    """Some stretch is a piece of at most LONGEST_PIECE tokens again and again: COPIES copies and FEWEST_TOKENS at
    least, the last copy perhaps cut."""
    n = len(tokens)
    for piece in range(1, LONGEST_PIECE + 1):
        length = max(COPIES * piece, FEWEST_TOKENS)
        for start in range(n - length + 1):
            copied = tokens[start : start + piece] * (length // piece + 1)
            if tokens[start : start + length] == copied[:length]:
                return True
    return False


def test_loops_agree_with_the_definition() -> None:
    rng = np.random.default_rng(0)
    seen = {True: 0, False: 0}
    for _ in range(150):
        text = rng.integers(0, 50, 60).tolist()
        piece = rng.integers(0, 50, int(rng.integers(1, 40))).tolist()
        copies = float(rng.uniform(1, 5))
        looped = (piece * 6)[: int(copies * len(piece))]
        tokens = text[:30] + looped + text[30:]
        expected = naive(tokens)
        assert loops(tokens) == expected, (piece, copies)
        seen[expected] += 1
    assert min(seen.values()) > 20, seen


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], False),
        ([1], False),
        ([7] * 31, False),
        ([7] * 32, True),
        (list(range(64)) * 3, True),
        (list(range(65)) * 9, False),
        (list(range(20)) * 3, True),
        (list(range(20)) * 3 + [99] * 3, True),
        (list(range(20)) * 2, False),
        (list(range(500)), False),
    ],
)
def test_loops_at_their_edges(tokens: list[int], expected: bool) -> None:
    assert loops(tokens) is expected


def answers(bad: str, count: int, of: int, length: int = 100) -> list[dict[str, Any]]:
    clean = {"mode": "greedy", "length": length, "loop": False, "empty": False, "invalid": False, "end": None}
    return [{**clean, bad: i < count} for i in range(of)]


def seen(bad: str = "loop", count: int = 0, of: int = 32, length: int = 100, **more: Any) -> dict[str, Any]:
    return {"status": "ok", "reason": "", "answers": answers(bad, count, of, length), "load": None, **more}


def test_the_sign_test_by_hand() -> None:
    assert more_than_chance([True] * 5, [False] * 5) == pytest.approx(1 / 32)
    assert more_than_chance([True] * 4, [False] * 4) == pytest.approx(1 / 16)
    assert more_than_chance([True, False], [False, True]) == pytest.approx(3 / 4)
    assert more_than_chance([True] * 9, [True] * 9) == 1.0


@pytest.mark.parametrize(
    ("model", "baseline", "reason"),
    [
        (seen(count=20), seen(count=20), ""),
        (seen(count=4), seen(count=0), ""),
        (seen(count=5), seen(count=0), "15.6% of the answers run into a loop, of BF16's 0.0% (by chance: 3.1%)"),
        (seen("empty", 6), seen("empty", 1), "18.8% of the answers are empty, of BF16's 3.1%"),
        (seen("invalid", 1), seen(), "3.1% of the answers hold probabilities that are no numbers"),
        (seen(length=130), seen(length=100), "answers are 1.30 times as long as BF16's"),
        (seen(length=124), seen(length=100), ""),
        (seen(length=79), seen(length=100), "answers are 0.79 times as long"),
        (seen(count=20), None, ""),
        (seen(), {"answers": [], "reason": "no room"}, "BF16 could not be observed: no room"),
        ({"answers": [], "reason": "no room"}, seen(), "no answer could be had: no room"),
        (
            seen(load={"status": "crashed", "reason": "gone", "concurrency": 8}),
            seen(),
            "under load at concurrency 8: crashed: gone",
        ),
    ],
)
def test_what_counts_against_a_model(model: dict[str, Any], baseline: Any, reason: str) -> None:
    result = judge(model, baseline)
    assert result["ok"] is (reason == "")
    assert reason in " ".join(result["reasons"])


def test_facts_of_a_completion() -> None:
    def choice(tokens: list[str], values: list[Any]) -> dict[str, Any]:
        return {"text": "".join(tokens), "logprobs": {"tokens": tokens, "token_logprobs": values}}

    fine = facts_of(choice([" a", " b"], [-1.0, -2.0]))
    assert fine == {"length": 2, "loop": False, "empty": False, "invalid": False, "end": None}
    assert facts_of(choice([" "], [-1.0]))["empty"]
    assert facts_of(choice([" a", " b"], [-1.0, None]))["invalid"]
    assert facts_of(choice([" a"], [math.nan]))["invalid"]
    looping = facts_of(choice([" la"] * 40, [-1.0] * 40))
    assert looping["loop"] and looping["end"].endswith(" la la")


def test_lengths_are_compared_in_pairs() -> None:
    ratio = length_ratio(answers("loop", 0, 8, 150), answers("loop", 0, 8, 100))
    assert ratio == {"value": 1.5, "low": 1.5, "high": 1.5}
    assert length_ratio([], answers("loop", 0, 8)) is None
