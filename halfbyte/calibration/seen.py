"""Which documents were seen: eight bytes each, however many there are."""

from __future__ import annotations

import numpy as np

_RECENT = 1 << 16


class Seen:
    """A set of 64-bit hashes: a small set of the latest, merged from time to time into one sorted array.

    Two different documents are taken for one with a chance of n² / 2⁶⁵ among n: 3e-8 for a million.
    """

    def __init__(self) -> None:
        self._sorted = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def add(self, value: int) -> bool:
        """Take a hash in; True when it is new."""
        if value in self._recent or self._has(value):
            return False
        self._recent.add(value)
        if len(self._recent) >= _RECENT:
            fresh = np.sort(np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent)))
            self._sorted = np.sort(np.concatenate([self._sorted, fresh]), kind="stable")
            self._recent.clear()
        return True

    def _has(self, value: int) -> bool:
        if not len(self._sorted):
            return False
        key = np.uint64(value)
        at = int(np.searchsorted(self._sorted, key))
        return at < len(self._sorted) and self._sorted[at] == key
