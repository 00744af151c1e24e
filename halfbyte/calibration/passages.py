"""Documents on their way to the sample: paragraphs joined to passages, exact duplicates and misfits left out, long
ones split. Every step is a generator, so nothing is held but the passage at hand.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

from halfbyte.calibration.languages import is_in
from halfbyte.calibration.records import Document
from halfbyte.calibration.seen import Seen
from halfbyte.calibration.spec import SetSpec
from halfbyte.calibration.text import content_hash

SHORT_PARAGRAPH = 40
"""Paragraphs of running text shorter than this (a heading, a brace) may repeat."""
_ENDS = (re.compile(r"\n[^\S\n]*\n\s*"), re.compile(r"\n"), re.compile(r"\s"))


@dataclass
class Tally:
    """How many documents there are after each step, in order."""

    steps: dict[str, int] = field(default_factory=dict)

    def count(self, step: str, documents: Iterable[Document]) -> Iterator[Document]:
        """Pass documents on and count them under `step`; the steps stand in the order of these calls."""
        self.steps[step] = 0
        return self._counted(step, documents)

    def _counted(self, step: str, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            self.steps[step] += 1
            yield document


def passages(documents: Iterable[Document], spec: SetSpec, size: int, seen: Seen, tally: Tally) -> Iterator[Document]:
    """The documents that may be used, each of at most about `size` characters; `tally` says what was left out."""
    stream = tally.count("read", documents)
    stream = tally.count("exact duplicates", _fresh(stream, seen))
    stream = tally.count("joined", join(stream, size))
    stream = tally.count("length", (one for one in stream if _fits(one, spec)))
    if spec.languages:
        stream = tally.count("language", _understood(stream, spec.languages))
    return tally.count("split", (part for one in stream for part in split(one, size)))


def join(documents: Iterable[Document], size: int) -> Iterator[Document]:
    """Paragraphs of running text joined until they have `size` characters; records stay as they are."""
    parts: list[Document] = []
    length = 0
    for document in documents:
        if parts and (not document.continues or length >= size):
            yield _joined(parts)
            parts, length = [], 0
        parts.append(document)
        length += len(document.text)
    if parts:
        yield _joined(parts)


def split(document: Document, size: int) -> Iterator[Document]:
    """A long document in parts of at most 1.5 `size` characters, cut at a paragraph, a line or a blank."""
    text, start, part = document.text, 0, document
    while len(text) - start > 1.5 * size:
        end = _cut(text, start, size)
        yield replace(part, text=text[start:end])
        start = end
        part = replace(document, kind="text") if document.kind == "instruction" else document
    yield replace(part, text=text[start:])


def _cut(text: str, start: int, size: int) -> int:
    """The last good place to cut in the second half of the `size` characters from `start` on."""
    for pattern in _ENDS:
        ends = deque((match.end() for match in pattern.finditer(text, start + size // 2, start + size)), maxlen=1)
        if ends:
            return ends[0]
    return start + size


def _joined(parts: list[Document]) -> Document:
    if len(parts) == 1:
        return replace(parts[0], continues=False)
    return Document("".join(part.text for part in parts), parts[0].origin, kind=parts[0].kind)


def _fresh(documents: Iterable[Document], seen: Seen) -> Iterator[Document]:
    for document in documents:
        may_repeat = document.continues and len(document.text) < SHORT_PARAGRAPH
        if may_repeat or seen.add(content_hash(document.text)):
            yield document


def _fits(document: Document, spec: SetSpec) -> bool:
    length = len(document.text.strip())
    return spec.min_chars <= length and (spec.max_chars is None or length <= spec.max_chars)


def _understood(documents: Iterable[Document], languages: Collection[str]) -> Iterator[Document]:
    return (document for document in documents if is_in(document.text, languages))
