"""Near duplicates by MinHash and locality-sensitive hashing. The one file that touches `datasketch`.

Broder, "On the resemblance and containment of documents" (1997): the chance that two sets have the same smallest hash
is their Jaccard similarity. Here the sets are a text's word 5-grams, and PERMUTATIONS such hashes estimate it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from halfbyte.calibration.text import ngram_hashes, words
from halfbyte.errors import HalfbyteError
from halfbyte.types import Progress, Quiet

SHINGLE = 5
"""Words of a shingle."""
PERMUTATIONS = 128
_BATCH = 4096


def near_duplicates(
    texts: Iterable[str], threshold: float, count: int = 0, progress: Progress | None = None
) -> list[bool]:
    """For each text, whether one before it, itself kept, has an estimated Jaccard similarity of `threshold` or more.

    Memory: a signature of PERMUTATIONS 32-bit numbers for each text that is kept. `count`: how many texts, for
    progress. Raises HalfbyteError where `datasketch` is not installed.
    """
    library = _library()
    progress = progress or Quiet()
    progress.start("looking for near duplicates", max(1, count))
    index = library.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    kept: dict[int, Any] = {}
    found = []
    for number, text in enumerate(texts):
        signature = _signature(library, text)
        alike = signature is not None and any(
            kept[other].jaccard(signature) >= threshold for other in index.query(signature)
        )
        if signature is not None and not alike:
            kept[number] = signature
            index.insert(number, signature)
        found.append(alike)
        progress.advance()
    return found


def _signature(library: Any, text: str) -> Any:
    """None for a text without words: it is like no other."""
    found = words(text)
    if not found:
        return None
    shingles = np.unique(ngram_hashes(found, min(SHINGLE, len(found)))) >> np.uint64(32)
    signature = library.MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int)
    for start in range(0, len(shingles), _BATCH):
        signature.update_batch(shingles[start : start + _BATCH])
    return signature


def _library() -> Any:
    try:
        import datasketch
    except ImportError:
        raise HalfbyteError(
            "near duplicates need datasketch: pip install datasketch, or --near-duplicates off"
        ) from None
    return datasketch
