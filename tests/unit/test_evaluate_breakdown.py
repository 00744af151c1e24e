"""Where two models differ: buckets, the histogram and the worst tokens, against sums written down a second time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfbyte.evaluate import TokenScores
from halfbyte.evaluate.breakdown import by_confidence, by_position, kl_histogram, worst
from halfbyte.evaluate.scoring import token_statistics
from tests.tiny import tiny_tokenizer


def scores(lengths: list[int], seed: int = 0) -> TokenScores:
    """Random scores of whole windows of these lengths."""
    rng = np.random.default_rng(seed)
    window = np.repeat(np.arange(len(lengths)), np.array(lengths) - 1)
    position = np.concatenate([np.arange(1, n) for n in lengths])
    many = len(window)
    top_baseline, top, token = (rng.integers(5, 8, many) for _ in range(3))
    return TokenScores(
        loglik_baseline=-rng.random(many), loglik=-rng.random(many), kl=rng.exponential(0.1, many).astype(np.float32),
        top1=top == top_baseline, token=token, top_baseline=top_baseline, top=top, shares=rng.random((many, 4)),
        window=window, position=position,
    )  # fmt: skip


def check(rows, values, found: TokenScores) -> None:
    """Every token is in one row, and the means are those of the row's tokens."""
    seen = np.zeros(len(values), bool)
    for row in rows:
        mask = (values >= row["from"]) & (values < row["to"])
        assert not (seen & mask).any() and mask.any()
        seen |= mask
        for name in ("kl", "top1"):
            assert row[name]["value"] == pytest.approx(getattr(found, name)[mask].mean())
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
            assert row[name]["low"] < row[name]["high"], "an interval over windows"
        assert row.get("tokens", mask.sum()) == mask.sum()
    assert seen.all()


def test_by_position_and_by_confidence():
    found = scores([70, 40, 70, 300, 20])
    rows = by_position(found)
    assert [(row["from"], row["to"]) for row in rows] == [(1, 16), (16, 32), (32, 64), (64, 512)], (
        "one window alone joins others"
    )
    check(rows, found.position, found)
    rows = by_confidence(found)
    assert [row["from"] for row in rows] == pytest.approx(np.arange(10) / 10) and rows[-1]["to"] == 1.0
    check(rows, found.shares[:, 0], found)
    found.shares[:, 0] = 1.0
    check([{**row, "to": 1.1} for row in by_confidence(found)], found.shares[:, 0], found)


def test_no_token_is_missing_in_the_histogram():
    kl = np.concatenate([[0.0, 1e-9, 25.0], np.random.default_rng(0).exponential(0.1, 500)]).astype(np.float32)
    drawn = kl_histogram(kl)
    edges, counts = drawn["edges"], drawn["counts"]
    assert edges == sorted(edges) and len(edges) == len(counts) + 1 and sum(counts) == len(kl)
    for low, high, count in zip(edges[:-1], edges[1:], counts[:-1]):
        assert count == ((kl >= low) & (kl < high)).sum()


def test_the_worst_tokens_in_context():
    tokenizer = tiny_tokenizer()
    text = "The treaty was signed in the city of Ghent"
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    generator = torch.Generator().manual_seed(0)
    p, q = (3 * torch.randn(len(ids) - 1, 320, generator=generator) for _ in range(2))
    found = {name: values.numpy() for name, values in token_statistics(p, q, ids[1:]).items()}
    at = np.arange(1, len(ids))
    rows = worst(TokenScores(**found, window=np.zeros_like(at), position=at), [ids], tokenizer, count=5)
    assert [row["kl"] for row in rows] == sorted(found["kl"].tolist(), reverse=True)[:5]
    row, lp, lq = rows[0], p.double().log_softmax(-1), q.double().log_softmax(-1)
    i = row["position"] - 1
    assert row["kl"] == pytest.approx(float((lp[i].exp() * (lp[i] - lq[i])).sum()), rel=1e-5)
    assert text.startswith(row["context"][-10:] + row["token"], max(0, i - 9)) and row["token"] == text[i + 1]
    for name, token in {"baseline_top": p[i].argmax(), "model_top": q[i].argmax(), "token": ids[i + 1]}.items():
        assert row[name] == tokenizer.decode([int(token)])
        given = row["probabilities"][name]
        assert [given["baseline"], given["model"]] == pytest.approx(
            [float(z[i, token].exp()) for z in (lp, lq)], rel=1e-4
        )
    assert (
        worst(TokenScores(**found, window=np.zeros_like(at), position=at), [ids])[0]["token"] == f"[{int(ids[i + 1])}]"
    )


def test_flips_are_answers_that_changed():
    found = scores([40, 40])
    right = [found.top_baseline == found.token, found.top == found.token]
    assert (found.flips == (right[0] ^ right[1])).all() and 0 < found.flips.mean() < 1
    assert not found.flips[~right[0] & ~right[1]].any(), "wrong before and after is no flip, whatever the tokens"
