"""A uniform sample of documents in bounded memory: those whose hashes are the smallest.

Each document's place in the queue is a hash of the seed and its text. A pool keeps the shortest beginning of that
queue that holds enough characters. So the sample is uniform over distinct documents, does not depend on the order in
which they come or on the machine, and meets a text twice as once.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from halfbyte.calibration.records import Document
from halfbyte.calibration.text import content_hash

_OVERHEAD = 256
"""Bytes that a short document costs beside its characters; it counts as so many at least."""


@dataclass(frozen=True)
class Candidate:
    """A document in the pool, with its place in the queue."""

    place: int
    document: Document


class Pool:
    """The documents of one source that may be used, at most about `room` characters of them."""

    def __init__(self, room: int, seed: int) -> None:
        self.room, self.key = room, f"halfbyte {seed}"
        self.offered = 0
        self._heap: list[tuple[int, Document]] = []
        self._places: set[int] = set()
        self._held = 0

    def offer(self, document: Document) -> None:
        """Take a document into the sample, if its place is among the first; the last ones go."""
        self.offered += 1
        place = content_hash(document.text, self.key)
        if (self._held >= self.room and place > -self._heap[0][0]) or place in self._places:
            return
        heapq.heappush(self._heap, (-place, document))
        self._places.add(place)
        self._held += _size(document)
        while self._held - _size(self._heap[0][1]) >= self.room:
            last, dropped = heapq.heappop(self._heap)
            self._places.remove(-last)
            self._held -= _size(dropped)

    def candidates(self) -> list[Candidate]:
        """The sample in the order of the queue."""
        return sorted((Candidate(-place, document) for place, document in self._heap), key=lambda one: one.place)

    @property
    def whole(self) -> bool:
        """Whether the sample is all that was offered."""
        return self._held < self.room


def _size(document: Document) -> int:
    return max(len(document.text), _OVERHEAD)
