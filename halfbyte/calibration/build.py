"""Build a calibration set: from text files or from the model's own writing, in mixed lengths or as one even stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from halfbyte.calibration.cut import MIN_TOKENS, cut_mixed, cut_stream, mixed_lengths
from halfbyte.calibration.selfgen import generate
from halfbyte.calibration.sources import describe_files, read_documents
from halfbyte.calibration.store import CalibrationSet
from halfbyte.calibration.tokens import Tokenizer, leading_special, text_ids, tokenizer_sha256
from halfbyte.errors import UsageError
from halfbyte.recipe.schema import CalibrationSpec
from halfbyte.types import Progress, Quiet

Strategy = Literal["mixed", "stream"]
_TOKENIZE = 512
"""Documents tokenized at a time."""


def build(
    tokenizer: Tokenizer,
    spec: CalibrationSpec,
    *,
    sources: Sequence[Path | str] = (),
    model: Any = None,
    strategy: Strategy = "mixed",
    portion: tuple[float, float] = (0.0, 1.0),
    progress: Progress | None = None,
) -> CalibrationSet:
    """A calibration set of about spec.sequences sequences of up to spec.max_tokens tokens.

    sources     text or JSONL files; without any, `model` (a transformers causal LM) writes the text itself.
    strategy    "mixed": lengths mixed up to max_tokens, beginning where paragraphs or documents begin.
                "stream": all text as one token stream, cut at even strides into pieces of exactly max_tokens.
    portion     the share of each file to use (the rest can serve to evaluate).
    What the tokenizer itself puts before a text (a BOS, for some) begins every sequence and counts in its length.
    Raises UsageError when neither sources nor model is given, HalfbyteError when the text is too short.
    """
    progress = progress or Quiet()
    facts: dict[str, Any] = {
        "strategy": strategy,
        "asked": {"sequences": spec.sequences, "max_tokens": spec.max_tokens},
        "seed": spec.seed,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
    }
    if sources:
        return _from_text(tokenizer, spec, sources, strategy, portion, facts, progress)
    if model is None:
        raise UsageError("no calibration text: name text or JSONL files, or give the model to write its own")
    if strategy != "mixed":
        raise UsageError(f"strategy {strategy} needs text files: a model's own text comes as mixed")
    lengths = mixed_lengths(spec.sequences, spec.max_tokens, spec.seed)
    own = generate(model, tokenizer, lengths, seed=spec.seed, progress=progress)
    facts["source"] = {"kind": "self-generated", "opening": own.opening, "temperature": 1.0}
    return CalibrationSet.of(own.sequences, facts, own.sampled)


def _from_text(
    tokenizer: Tokenizer,
    spec: CalibrationSpec,
    sources: Sequence[Path | str],
    strategy: Strategy,
    portion: tuple[float, float],
    facts: dict[str, Any],
    progress: Progress,
) -> CalibrationSet:
    documents = read_documents(sources, tokenizer, portion)
    head = leading_special(tokenizer)
    room = spec.max_tokens - len(head)
    if strategy == "stream":
        progress.start("tokenizing", 1)
        stream = text_ids(tokenizer, ["".join(document.text for document in documents)])[0]
        progress.advance(note=f"{len(stream):,} tokens")
        cut, available = cut_stream(stream, spec.sequences, room), len(stream)
    else:
        pieces = _tokenize(tokenizer, [document.text for document in documents], progress)
        lengths = [max(MIN_TOKENS, n - len(head)) for n in mixed_lengths(spec.sequences, spec.max_tokens, spec.seed)]
        cut = cut_mixed(pieces, [document.continues for document in documents], lengths, room, spec.seed)
        available = sum(map(len, pieces))
    files = describe_files(sources)
    facts["source"] = {
        "kind": "text",
        "files": files,
        "portion": list(portion),
        "documents": len(documents),
        "tokens": available,
    }
    return CalibrationSet.of([torch.tensor(_headed(ids, head)) for ids in cut], facts)


def _tokenize(tokenizer: Tokenizer, texts: list[str], progress: Progress) -> list[list[int]]:
    progress.start("tokenizing", len(texts))
    pieces: list[list[int]] = []
    for start in range(0, len(texts), _TOKENIZE):
        pieces += text_ids(tokenizer, texts[start : start + _TOKENIZE])
        progress.advance(min(_TOKENIZE, len(texts) - start))
    return pieces


def _headed(ids: list[int], head: list[int]) -> list[int]:
    return ids if ids[: len(head)] == head else head + ids
