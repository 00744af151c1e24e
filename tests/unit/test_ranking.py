"""The ranking: who is better, who cannot be told apart, and who is beaten by none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from halfbyte.experiments.ranking import Scored, difference, pareto, rank

FLOOR = {"kl_mean": 0.001, "ppl_ratio": 1.0005, "top1": 0.99}
WINDOWS = 40


def scored(name: str, kl: np.ndarray, size: int = 100, speed: float | None = None, gap: float = 0.1) -> Scored:
    tokens = np.full(len(kl), 10)
    return Scored(name, {"tokens": tokens, "kl": kl * tokens, "gap": np.full(len(kl), gap) * tokens}, size, speed)


def noise(scale: float, seed: int) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal(WINDOWS)


@pytest.fixture()
def hard() -> np.ndarray:
    """How hard each window is: what all cells' figures share."""
    return 0.2 + 0.15 * np.random.default_rng(9).random(WINDOWS)


def ranks(rows: list[dict]) -> dict[str, int]:
    return {row["name"]: row["rank"] for row in rows}


def test_pairs_tell_apart_what_intervals_alone_do_not(hard: np.ndarray) -> None:
    """Each window a little worse: the two means' own intervals overlap widely, the pairs' does not hold 0."""
    a, b = scored("a", hard), scored("b", hard + 0.01 + noise(0.002, 1))
    alone = hard.std() / math.sqrt(WINDOWS) * 2
    assert alone > 0.01
    gap = difference(b, a)
    assert gap["value"] == pytest.approx(0.01, abs=0.002) and gap["low"] > 0
    rows = rank([b, a], FLOOR)
    assert ranks(rows) == {"a": 1, "b": 2} and rows[1]["equal_to"] is None
    assert rows[1]["difference"]["value"] == gap["value"] and rows[1]["why"] == "paired bootstrap"


def test_a_difference_that_may_be_chance_is_none(hard: np.ndarray) -> None:
    rows = rank([scored("a", hard), scored("b", hard + 0.003 + noise(0.05, 2))], FLOOR)
    assert ranks(rows) == {"a": 1, "b": 1}
    other = next(row for row in rows if row["equal_to"])
    assert other["why"] == "paired bootstrap" and other["difference"]["low"] <= 0 <= other["difference"]["high"]


def test_within_the_noise_floor_is_equal_however_sure(hard: np.ndarray) -> None:
    cells = [scored("a", hard), scored("b", hard + 0.0009)]
    assert difference(cells[1], cells[0])["low"] > 0
    rows = rank(cells, FLOOR)
    assert ranks(rows) == {"a": 1, "b": 1} and rows[1]["why"] == "within the noise floor"
    assert ranks(rank(cells, {**FLOOR, "kl_mean": 0.0005})) == {"a": 1, "b": 2}


def test_the_same_bytes_are_equal_and_ranks_go_on_behind_them(hard: np.ndarray) -> None:
    rows = rank([scored("c", hard + 0.1), scored("b", hard), scored("a", hard)], FLOOR)
    assert ranks(rows) == {"a": 1, "b": 1, "c": 3} and rows[1]["why"] == "the same figures"


def test_equality_does_not_creep(hard: np.ndarray) -> None:
    """Each is within the floor of the one before, the third not of the first: it begins a rank of its own."""
    rows = rank([scored(n, hard + step) for n, step in (("a", 0.0), ("b", 0.0008), ("c", 0.0016))], FLOOR)
    assert ranks(rows) == {"a": 1, "b": 1, "c": 3}


def test_within_a_rank_speed_then_bytes_decide(hard: np.ndarray) -> None:
    same = [scored("big", hard, 120), scored("small", hard, 80), scored("worse", hard + 0.1, 10)]
    assert [row["name"] for row in rank(same, FLOOR)] == ["small", "big", "worse"]
    timed = [scored("big", hard, 120, 300.0), scored("small", hard, 80, 200.0), scored("worse", hard + 0.1, 10, 900.0)]
    assert [row["name"] for row in rank(timed, FLOOR)] == ["big", "small", "worse"]


def test_by_perplexity(hard: np.ndarray) -> None:
    cells = [scored("a", hard, gap=0.2), scored("b", hard + 0.1, gap=0.1), scored("c", hard, gap=0.1003)]
    assert ranks(rank(cells, FLOOR)) == {"a": 1, "c": 1, "b": 3}
    by = rank(cells, FLOOR, "ppl")
    assert ranks(by) == {"b": 1, "c": 1, "a": 3}
    assert next(r for r in by if r["name"] == "c")["why"] == "within the noise floor"


def test_the_front(hard: np.ndarray) -> None:
    cells = [scored("best", hard, 100), scored("light", hard + 0.1, 50), scored("beaten", hard + 0.11, 60)]
    cells += [scored("twin", hard, 100), scored("heavy", hard, 101)]
    assert {row["name"] for row in rank(cells, FLOOR) if row["pareto"]} == {"best", "twin", "light"}


def test_speed_counts_on_the_front_only_where_all_have_it(hard: np.ndarray) -> None:
    slow, fast = scored("slow", hard, 100, 10.0), scored("fast", hard + 0.1, 110, 20.0)
    assert {row["name"] for row in rank([slow, fast], FLOOR) if row["pareto"]} == {"slow", "fast"}
    assert {r["name"] for r in rank([slow, scored("fast", hard + 0.1, 110)], FLOOR) if r["pareto"]} == {"slow"}


def test_pareto_by_hand() -> None:
    names, axes = list("abcd"), [(1.0, 5.0), (2.0, 2.0), (3.0, 3.0), (5.0, 1.0)]
    assert pareto(names, axes) == {"a", "b", "d"}
    assert pareto(["x", "y"], [(1.0, 1.0), (1.0, 1.0)]) == {"x", "y"}


def test_windows_of_unlike_length_weigh_by_their_tokens() -> None:
    sums = {"tokens": [90, 10], "kl": [9.0, 10.0], "gap": [0.0, 0.0]}
    assert Scored("a", sums, 1).value("kl") == pytest.approx(0.19)
