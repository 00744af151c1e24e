"""How an answer is scored against accepted answers: exact match, F1, ROUGE-L, and the statistics that BLEU sums.

EM and F1 as in SQuAD (Rajpurkar et al., 2016), but on words of any script; ROUGE-L as in Lin, 2004 (F-measure);
BLEU by sacrebleu (Post, 2018). Of several accepted answers the best counts; for BLEU all are references.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.paired import Statistic

_ARTICLES = {"a", "an", "the"}
_WORD = re.compile(r"\w+")
BLEU_ORDER = 4


def normal_words(text: str) -> list[str]:
    """Words in lower case without punctuation and English articles, as EM and F1 compare them."""
    kept = "".join(" " if unicodedata.category(c).startswith("P") and c != "'" else c for c in text.lower())
    return [word for word in kept.replace("'", "").split() if word not in _ARTICLES]


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 where the answer has the words of an accepted one, else 0."""
    return float(any(normal_words(answer) == normal_words(right) for right in accepted))


def f1(answer: str, accepted: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of words, against the accepted answer where it is largest."""
    return max(_f1(normal_words(answer), normal_words(right)) for right in accepted)


def rouge_l(answer: str, accepted: Sequence[str]) -> float:
    """The F-measure of the longest common subsequence of words, likewise."""
    said = _WORD.findall(answer.lower())
    return max(_lcs_f1(said, _WORD.findall(right.lower())) for right in accepted)


def bleu_statistics(answer: str, accepted: Sequence[str]) -> list[float]:
    """Matched and possible n-grams (n = 1..4), length of the answer and of the closest reference: [10], summed over
    items by `BLEU`. Raises HalfbyteError where sacrebleu is missing."""
    found = _sacrebleu().BLEU().corpus_score([answer], [[right] for right in accepted])
    return [*found.counts, *found.totals, found.sys_len, found.ref_len]


def _bleu(means: np.ndarray) -> np.ndarray:
    """BLEU 0..100 from mean statistics [R, 10]; an order without a match counts as 0 (no smoothing)."""
    matched, possible = means[:, :BLEU_ORDER], means[:, BLEU_ORDER : 2 * BLEU_ORDER]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.log(np.where(possible > 0, matched / possible, 0.0)).mean(axis=1)
        brevity = np.minimum(0.0, 1.0 - means[:, 9] / means[:, 8])
        return 100 * np.where(means[:, 8] > 0, np.exp(precision + brevity), 0.0)


BLEU = Statistic(of_means=_bleu)


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    shared = sum((Counter(said) & Counter(right)).values())
    return 2 * shared / (len(said) + len(right))


def _lcs_f1(said: list[str], right: list[str]) -> float:
    row = [0] * (len(right) + 1)
    for word in said:
        diagonal = 0
        for j, other in enumerate(right, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return 2 * row[-1] / (len(said) + len(right)) if said and right else 0.0


def _sacrebleu() -> Any:
    try:
        import sacrebleu.metrics
    except ImportError:
        raise HalfbyteError("BLEU needs sacrebleu: pip install sacrebleu") from None
    return sacrebleu.metrics
