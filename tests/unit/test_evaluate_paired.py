"""Paired items, and how answers are scored, against the field's own libraries."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import metrics
from halfbyte.evaluate.paired import PERPLEXITY, Statistic, average, compare_items
from halfbyte.evaluate.qa import METRICS

SAID = ["The cat sat on the mat.", "paris", "It is, I think, 42", "", "a b c d e f", "Nein, danke schön"]
RIGHT = [["A cat sat on a mat", "no cat"], ["Paris!"], ["42"], ["something"], ["f e d c b a", "a b x c d"],
         ["nein danke"]]  # fmt: skip


def test_words_are_compared_as_squad_does() -> None:
    assert metrics.exact_match("The  Answer, is: 42!", ["answer is 42"]) == 1
    assert metrics.exact_match("42 apples", ["42"]) == 0
    assert metrics.f1("the quick fox", ["quick brown fox"]) == pytest.approx(2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3))
    assert metrics.f1("", ["x"]) == 0 and metrics.f1("", ["the"]) == 1
    assert metrics.f1("東京 です", ["東京"]) == pytest.approx(2 / 3)


def test_rouge_and_bleu_are_the_libraries() -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    for said, accepted in zip(SAID[:-1], RIGHT):
        expected = max(scorer.score(right, said)["rougeL"].fmeasure for right in accepted)
        assert metrics.rouge_l(said, accepted) == pytest.approx(expected)
    said = ["the cat sat on the mat today", "it was a very long day for all of us", "hello"]
    right = [["the cat sat on the mat", "a cat sat on the mat today"], ["it was a long day for all of us"] * 2,
             ["hello there"] * 2]  # fmt: skip
    rows = np.array([metrics.bleu_statistics(*pair) for pair in zip(said, right)])
    expected = sacrebleu.corpus_bleu(said, [[r[0] for r in right], [r[1] for r in right]], smooth_method="none").score
    assert metrics.BLEU.value(rows) == pytest.approx(expected) and 20 < expected < 90
    drawn = sacrebleu.corpus_bleu([said[0]] * 2 + [said[1]], [[right[0][k]] * 2 + [right[1][k]] for k in (0, 1)])
    assert metrics.BLEU.replicates(rows, np.array([[2, 1, 0]]))[0] == pytest.approx(drawn.score)
    assert set(METRICS) == {"em", "f1", "rouge_l", "bleu"}


def test_a_difference_is_paired() -> None:
    """Hard and easy items, the model wrong on 10 of the easy ones: known far better than the accuracies are."""
    baseline = np.arange(200) % 2
    model = baseline.copy()
    model[np.flatnonzero(baseline)[:10]] = 0
    row = compare_items("task", "acc", baseline, model, lengths=([10] * 200, [11] * 200)).row
    assert row["baseline"]["value"] == 0.5 and row["difference"]["value"] == pytest.approx(-0.05)
    assert row["flips"] == 0.05 and row["recovery"]["value"] == pytest.approx(0.9)
    paired = row["difference"]["high"] - row["difference"]["low"]
    alone = row["model"]["high"] - row["model"]["low"]
    exact = 2 * 1.96 * np.sqrt(0.05 * 0.95 / 200)
    assert paired == pytest.approx(exact, rel=0.15) and alone > 2 * paired
    assert row["length"]["passed"] and row["length"]["ratio"]["value"] == pytest.approx(1.1)


def test_lower_is_better_and_nothing_to_recover() -> None:
    logliks = np.log([0.5, 0.25, 0.125])
    row = compare_items("t", "ppl", logliks, logliks - 0.1, statistic=PERPLEXITY, higher_is_better=False).row
    assert row["baseline"]["value"] == pytest.approx(4) and row["recovery"]["value"] == pytest.approx(np.exp(-0.1))
    assert row["flips"] is None
    none = compare_items("t", "acc", [0, 0], [0, 1])
    assert none.row["recovery"] is None and none.row["flips"] == 0.5
    both = average([none, compare_items("u", "acc", [1, 1], [1, 1])])
    assert both["recovery"]["value"] == 1 and both["difference"]["value"] == 0.25
    slow = Statistic(of_items=lambda items: max(items))
    assert compare_items("t", "max", [1, 5], [2, 3], statistic=slow).row["difference"]["value"] == -2
    with pytest.raises(HalfbyteError, match="2 and 1 items"):
        compare_items("t", "acc", [1, 1], [1])


@pytest.mark.parametrize(
    ("model", "passed"),
    [([30] * 40, False), ([20] * 40, True), ([12] * 39 + [900], True), ([0] * 40, True)],
    ids=["rambles", "as long", "one long answer may be chance", "silent"],
)
def test_rambling(model: list[int], passed: bool) -> None:
    row = compare_items("t", "em", [1] * 40, [1] * 40, lengths=([20] * 40, model)).row
    assert row["length"]["passed"] is passed
    assert compare_items("t", "em", [1], [1], lengths=([0], [3])).row["length"]["passed"] is False
