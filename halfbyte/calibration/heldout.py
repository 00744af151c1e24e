"""Whether calibration text was seen in the text to be judged on, by word n-grams; and what that text's tokens are.

As in the appendix on contamination of Brown et al., "Language Models are Few-Shot Learners" (2020): texts overlap where
they share 13 words in a row, case and punctuation left out; a shorter text counts whole from 8 words on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.calibration.passages import join
from halfbyte.calibration.readers import kind_of_file, read_file
from halfbyte.calibration.sources import describe_files
from halfbyte.calibration.text import ngram_hashes, words
from halfbyte.calibration.tokens import Tokenizer, text_ids
from halfbyte.errors import HalfbyteError
from halfbyte.types import Progress, Quiet

NGRAM, LEAST = 13, 8
_PASSAGE = 1 << 18
_SHOWN = 8


@dataclass(frozen=True)
class HeldOut:
    """The evaluation text, as far as calibration needs it.

    grams       by n, the sorted hashes of its word n-grams.
    tokens      int64 [vocabulary]: how often each token occurs in it.
    files       name, bytes and SHA-256 of each file.
    unchecked   texts of fewer than LEAST words, which cannot be looked for.
    """

    grams: dict[int, np.ndarray]
    tokens: np.ndarray
    files: list[dict[str, Any]]
    unchecked: int


@dataclass(frozen=True)
class Hit:
    """A text that shares `ngrams` of its n-grams with the evaluation text; `words` are the first ones."""

    index: int
    ngrams: int
    words: str


def read_held_out(paths: Sequence[str], tokenizer: Tokenizer, progress: Progress | None = None) -> HeldOut:
    """Text, JSONL (every string of a record) or Parquet files, streamed. Raises like read_file."""
    grams: dict[int, list[np.ndarray]] = {}
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    unchecked = 0
    for path in map(Path, paths):
        documents = read_file(path, whole_records=True, progress=progress)
        for document in join(documents, _PASSAGE) if kind_of_file(path) == "text" else documents:
            counts += token_counts(text_ids(tokenizer, [document.text]), len(counts))
            found = words(document.text)
            if len(found) < LEAST:
                unchecked += 1
                continue
            n = min(NGRAM, len(found))
            grams.setdefault(n, []).append(np.unique(ngram_hashes(found, n)))
    merged = {n: np.unique(np.concatenate(grams[n])) for n in sorted(grams)}
    return HeldOut(merged, counts, describe_files(paths), unchecked)


def find_hits(held_out: HeldOut, texts: Iterable[str], progress: Progress | None = None) -> list[Hit]:
    """The texts that share n-grams with the evaluation text."""
    progress = progress or Quiet()
    hits = []
    for index, text in enumerate(texts):
        found, total, first = words(text), 0, ""
        for n, known in held_out.grams.items():
            mine = ngram_hashes(found, n)
            at = np.searchsorted(known, mine)
            same = known[np.minimum(at, len(known) - 1)] == mine
            total += int(same.sum())
            if same.any() and not first:
                start = int(same.argmax())
                first = " ".join(found[start : start + n])
        if total:
            hits.append(Hit(index, total, first))
        progress.advance()
    return hits


def contamination(
    held_out: HeldOut, texts: Sequence[str], allowed: bool, dropped: int | None, progress: Progress
) -> dict[str, Any]:
    """What the manifest says of it. Raises HalfbyteError for a sequence that was hit, unless that is allowed."""
    progress.start("looking for the held-out text", len(texts))
    hits = find_hits(held_out, texts, progress)
    names = ", ".join(row["file"] for row in held_out.files)
    if hits and not allowed:
        raise HalfbyteError(
            f"{len(hits)} of {len(texts)} sequences ({len(hits) / len(texts):.1%}) share {NGRAM} words in a row with "
            f"{names}, the first: '{hits[0].words}': leave those documents out with --drop-contaminated, or take them "
            "with --allow-contamination"
        )
    return {
        "ngram": NGRAM,
        "least_words": LEAST,
        "held_out": held_out.files,
        "ngrams": int(sum(len(known) for known in held_out.grams.values())),
        "texts_too_short_to_look_for": held_out.unchecked,
        "sequences_too_short_to_look_in": sum(len(words(text)) < NGRAM for text in texts),
        "documents_dropped": dropped,
        "sequences": len(hits),
        "share": round(len(hits) / max(1, len(texts)), 6),
        "allowed": allowed,
        "hits": [{"sequence": hit.index, "ngrams": hit.ngrams, "words": hit.words} for hit in hits[:_SHOWN]],
    }


def token_counts(pieces: Iterable[Sequence[int] | np.ndarray], vocabulary: int) -> np.ndarray:
    """int64 [vocabulary]: how often each token occurs."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for ids in pieces:
        if len(ids):
            found = np.bincount(np.asarray(ids, dtype=np.int64), minlength=vocabulary)
            counts += found[:vocabulary]
    return counts


def texts_of(sequences: Iterable[Any], tokenizer: Tokenizer) -> list[str]:
    """The text of each sequence of token ids, without special tokens."""
    return [tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in sequences]
