"""What a calibration set is good for, measured: coverage, diversity, and warnings with stated thresholds."""

from __future__ import annotations

import bz2
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from halfbyte.calibration.heldout import token_counts
from halfbyte.calibration.spec import SetSpec
from halfbyte.recipe.schema import Method

GUIDE_SEQUENCES = (128, 512)
"""The strategy's number of sequences for GPTQ and AWQ."""
GUIDE_TOKENS = (20_000, 200_000)
"""The strategy's number of tokens for NVFP4."""
LEAST_DISTINCT = 0.5
"""Distinct 4-grams of tokens as a share of all, below which a set repeats itself."""
MOST_COMPRESSED = 6.0
"""Bytes of text for each byte that bzip2 makes of it, above which a set repeats itself."""
LEAST_DOCUMENTS = 32
MOST_ONE_SOURCE = 0.9
MOST_INSTRUCTION = 0.9
SHARE_MISSED = 0.02
"""How far a source's share of the tokens may be from what was asked, before it is told."""
_NGRAM, _STEP = 4, np.uint64(0x9E3779B97F4A7C15)


def diversity(sequences: Sequence[torch.Tensor], texts: Sequence[str]) -> dict[str, Any]:
    """Distinct token 4-grams as a share of all, and how many times bzip2 shrinks the text."""
    packed = [_token_ngrams(sequence) for sequence in sequences]
    grams = np.concatenate(packed) if packed else np.empty(0, dtype=np.uint64)
    raw = "\n".join(texts).encode()
    return {
        "distinct_4grams": round(len(np.unique(grams)) / max(1, len(grams)), 6),
        "compression": round(len(raw) / max(1, len(bz2.compress(raw))), 4),
    }


def coverage(
    sequences: Sequence[torch.Tensor], vocabulary: int, against: Mapping[str, np.ndarray | None]
) -> dict[str, Any]:
    """The share of the vocabulary that occurs in the set and, for each text in `against` (its token counts, int64
    [vocabulary]), the share of its tokens that do; null where there is no such text."""
    present = token_counts([sequence.numpy() for sequence in sequences], vocabulary) > 0
    found: dict[str, Any] = {"vocabulary": round(float(present.mean()), 6), "distinct_tokens": int(present.sum())}
    for name, counts in against.items():
        total = 0 if counts is None else int(counts.sum())
        found[name] = round(float(counts[present].sum() / total), 6) if counts is not None and total else None
    return found


def warnings(
    manifest: Mapping[str, Any], spec: SetSpec, methods: Collection[Method], *, chat: bool, longest_possible: int | None
) -> list[dict[str, str]]:
    """What a user should know of a set, each {"code", "message"}.

    methods            what it is made for; none: unknown, every rule counts.
    chat               whether the model has a chat template.
    longest_possible   tokens that the model can take, where it is known.
    """
    found = [
        *_weights(spec),
        *_sizes(manifest, methods),
        *_lengths(manifest, spec, longest_possible),
        *_contents(manifest, chat),
    ]
    return [{"code": code, "message": message} for code, message in found]


def _weights(spec: SetSpec) -> list[tuple[str, str]]:
    given = [source.weight for source in spec.sources if source.weight is not None]
    if not given or abs(math.fsum(given) - 1) < 1e-6:
        return []
    shares = ", ".join(f"{source.name} {share:.1%}" for source, share in zip(spec.sources, spec.shares()))
    return [("weights", f"the weights sum to {math.fsum(given):g}, taken as shares: {shares}")]


def _sizes(manifest: Mapping[str, Any], methods: Collection[Method]) -> list[tuple[str, str]]:
    found = []
    count, tokens = manifest["sequences"], manifest["tokens"]
    low, high = GUIDE_SEQUENCES
    if not low <= count <= high and (not methods or set(methods) & {"gptq", "awq"}):
        found.append(("sequences", f"{count:,} sequences; for GPTQ and AWQ the guide is {low} to {high}"))
    low, high = GUIDE_TOKENS
    if not low <= tokens <= high and (not methods or "nvfp4" in methods):
        found.append(("tokens", f"{tokens:,} tokens; for NVFP4 the guide is {low:,} to {high:,}"))
    return found


def _lengths(manifest: Mapping[str, Any], spec: SetSpec, possible: int | None) -> list[tuple[str, str]]:
    found = []
    if manifest["longest"] <= spec.max_tokens // 2:
        found.append(
            ("short", f"the longest sequence has {manifest['longest']:,} tokens, the target is {spec.max_tokens:,}: "
             "add longer documents")
        )  # fmt: skip
    if possible is not None and manifest["longest"] > possible:
        found.append(("positions", f"sequences of {manifest['longest']:,} tokens; the model takes {possible:,}"))
    return found


def _contents(manifest: Mapping[str, Any], chat: bool) -> list[tuple[str, str]]:
    found = []
    kinds, sources = manifest.get("kinds") or {}, manifest.get("sources") or []
    instruction = kinds.get("instruction", 0) / max(1, sum(kinds.values()))
    if instruction >= MOST_INSTRUCTION:
        what = "this is a chat model" if chat else "if general chat is to be served"
        found.append(
            ("instruction-only", f"{instruction:.0%} of the tokens are single instructions, and {what}: "
             "add conversations and plain text")
        )  # fmt: skip
    documents = sum(row["used_documents"] for row in sources)
    if sources and documents < LEAST_DOCUMENTS <= manifest["sequences"]:
        found.append(("few-documents", f"all sequences come from {documents} documents: add others"))
    for row in sources:
        if len(sources) > 1 and row["share"] >= MOST_ONE_SOURCE:
            found.append(("one-source", f"{row['share']:.0%} of the tokens come from {row['name']} alone"))
        if row["share"] < row["weight"] - SHARE_MISSED:
            reached = f"{row['name']} gives {row['share']:.1%} of the tokens, {row['weight']:.1%} were asked"
            found.append(("share", f"{reached}: it has no more text, and other sources fill its place"))
    measured = manifest.get("diversity") or {}
    if measured.get("distinct_4grams", 1.0) < LEAST_DISTINCT:
        share = f"{measured['distinct_4grams']:.0%}"
        found.append(("repetitive", f"only {share} of the 4-grams of tokens are distinct (the least is 50%): vary it"))
    if measured.get("compression", 0.0) > MOST_COMPRESSED:
        found.append(
            ("compressible", f"bzip2 shrinks the text {measured['compression']:.1f} times (6 is the most): vary it")
        )
    return found


def _token_ngrams(sequence: torch.Tensor) -> np.ndarray:
    """uint64 [max(0, T - 3)]: a hash of each 4 tokens in a row."""
    ids = sequence.numpy().astype(np.uint64)
    count = max(0, len(ids) - _NGRAM + 1)
    packed = np.zeros(count, dtype=np.uint64)
    for offset in range(_NGRAM):
        packed = packed * _STEP
        packed += ids[offset : offset + count]
    return packed
