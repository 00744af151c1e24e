"""Words of a text and hashes of its word n-grams: the measure of what is alike, for any script.

Words are runs of letters and digits in lower case, without punctuation; in scripts that put no space between words
(Han, Kana, Thai, Lao, Khmer, Burmese) each character is one. Hashes are the same on every machine and in every process.
"""

from __future__ import annotations

import functools
import hashlib
import re

import numpy as np

_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_STEP, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def ngram_hashes(found: list[str], n: int) -> np.ndarray:
    """uint64 [max(0, len(found) - n + 1)]: a hash of each n words in a row."""
    count = len(found) - n + 1
    if count < 1:
        return np.empty(0, dtype=np.uint64)
    each = np.fromiter(map(_word_hash, found), dtype=np.uint64, count=len(found))
    rolled = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        rolled = rolled * _STEP + each[offset : offset + count]
    rolled ^= rolled >> np.uint64(32)
    rolled *= _MIX
    return rolled ^ (rolled >> np.uint64(29))


def content_hash(text: str, key: str = "") -> int:
    """64 bits of BLAKE2b of a text, white space taken as one blank; `key` makes it another hash."""
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8, key=key.encode())
    return int.from_bytes(digest.digest(), "little")


@functools.lru_cache(maxsize=1 << 17)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
