"""The curated set: every source streamed through the filters into a bounded sample, then cut to mixed lengths.

What is held at a time: eight bytes for each distinct document, and for each source a pool of candidates with a few
times the text that it has to give. Near duplicates, tokens and the held-out text are looked at for those alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfbyte.calibration import hub, near
from halfbyte.calibration.cut import MIN_TOKENS, mixed_lengths
from halfbyte.calibration.fit import Piece, fit
from halfbyte.calibration.heldout import HeldOut, find_hits, token_counts
from halfbyte.calibration.passages import Tally, passages
from halfbyte.calibration.readers import kind_of_file, read_file
from halfbyte.calibration.records import Document
from halfbyte.calibration.sample import Pool
from halfbyte.calibration.seen import Seen
from halfbyte.calibration.sources import describe_files
from halfbyte.calibration.spec import SetSpec, Source
from halfbyte.calibration.tokens import Tokenizer, leading_special, text_ids
from halfbyte.errors import HalfbyteError
from halfbyte.types import Progress, Quiet

CHARACTERS = 6
"""Characters of text that are held for each token wanted."""
RESERVE, LEAST_RESERVE = 4.0, 1.5
"""A pool holds RESERVE times the source's share of the tokens, and LEAST_RESERVE times the whole set at least."""
_TOKENIZE = 256


@dataclass
class _Pool:
    """One source on its way: what was counted, which candidates are left, their tokens."""

    source: Source
    tally: Tally
    facts: dict[str, Any]
    documents: list[Document]
    dropped: int = 0
    ids: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class Curated:
    """`sequences` int64 [T] each; `facts` for the manifest; token counts int64 [vocabulary] of all candidates and of
    those that are marked in-domain (None where none is)."""

    sequences: list[torch.Tensor]
    facts: dict[str, Any]
    candidate_tokens: np.ndarray
    in_domain_tokens: np.ndarray | None


def curate(
    tokenizer: Tokenizer,
    spec: SetSpec,
    held_out: HeldOut | None = None,
    progress: Progress | None = None,
) -> Curated:
    """Sequences from spec.sources, about spec.sequences of up to spec.max_tokens tokens.

    held_out    documents that share n-grams with it are left out.
    Raises UsageError and HalfbyteError, each one line, for sources that cannot be read, hold nothing that passes the
    filters, or give too few tokens.
    """
    progress = progress or Quiet()
    pools = _sample(tokenizer, spec, progress)
    if spec.near_duplicates is not None:
        _leave_out_near_duplicates(pools, spec.near_duplicates, progress)
    if held_out is not None:
        _leave_out_held_out(pools, held_out, progress)
    for pool in pools:
        if not pool.documents:
            raise HalfbyteError(_nothing_left(pool))
    _tokenize(tokenizer, pools, progress)
    head = leading_special(tokenizer)
    lengths = [max(MIN_TOKENS, n - len(head)) for n in mixed_lengths(spec.sequences, spec.max_tokens, spec.seed)]
    shares = spec.shares()
    pieces = fit([pool.ids for pool in pools], shares, lengths, spec.max_tokens - len(head))
    order = np.random.default_rng([spec.seed, 3]).permutation(len(pieces))
    pieces = [pieces[i] for i in order]
    inside = [ids for pool in pools if pool.source.in_domain for ids in pool.ids]
    return Curated(
        [torch.tensor(_headed(piece.ids.tolist(), head)) for piece in pieces],
        _facts(spec, pools, pieces, shares),
        token_counts((ids for pool in pools for ids in pool.ids), len(tokenizer)),
        token_counts(inside, len(tokenizer)) if inside else None,
    )


def _sample(tokenizer: Tokenizer, spec: SetSpec, progress: Progress) -> list[_Pool]:
    """Stream every source once. A document that two sources have belongs to the first."""
    seen, pools = Seen(), []
    wanted = sum(mixed_lengths(spec.sequences, spec.max_tokens, spec.seed)) * CHARACTERS
    for source, share in zip(spec.sources, spec.shares()):
        tally, facts = Tally(), _described(source)
        pool = Pool(int(wanted * max(RESERVE * share, LEAST_RESERVE)), spec.seed)
        for document in passages(
            _documents(source, tokenizer, facts, progress), spec, spec.max_tokens * CHARACTERS, seen, tally
        ):
            pool.offer(document)
        candidates = [candidate.document for candidate in pool.candidates()]
        tally.steps["sampled"] = len(candidates)
        pools.append(_Pool(source, tally, facts, candidates))
    return pools


def _described(source: Source) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": source.name}
    if source.path is None:
        facts |= {"kind": "hub", "split": source.split}
    else:
        facts["kind"] = kind_of_file(Path(source.path))
    return facts | {"field": source.field, "in_domain": source.in_domain, "limit": source.limit}


def _documents(source: Source, tokenizer: Tokenizer, facts: dict[str, Any], progress: Progress) -> Iterator[Document]:
    """The documents of a source; where they end, `facts` gets their hash."""
    if source.path is not None:
        path = Path(source.path)
        yield from islice(read_file(path, tokenizer, field=source.field, progress=progress), source.limit)
        described = describe_files([path])[0]
        facts |= {"bytes": described["bytes"], "sha256": described["sha256"]}
        return
    stream, facts["revision"] = hub.open_hub(source)
    facts["limit"] = source.limit or hub.HUB_LIMIT
    digest = hashlib.sha256()
    for document in hub.read_hub(stream, source, tokenizer, progress):
        data = document.text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        yield document
    facts["sha256"] = digest.hexdigest()


def _leave_out_near_duplicates(pools: list[_Pool], threshold: float, progress: Progress) -> None:
    """Of documents that are alike, one in-domain stays rather than another, else the first source's."""
    order = sorted(range(len(pools)), key=lambda i: (not pools[i].source.in_domain, i))
    texts = [document.text for i in order for document in pools[i].documents]
    alike = iter(near.near_duplicates(texts, threshold, len(texts), progress))
    for i in order:
        pools[i].documents = [document for document in pools[i].documents if not next(alike)]
        pools[i].tally.steps["near duplicates"] = len(pools[i].documents)


def _leave_out_held_out(pools: list[_Pool], held_out: HeldOut, progress: Progress) -> None:
    for pool in pools:
        progress.start("leaving out held-out text", max(1, len(pool.documents)))
        hit = {hit.index for hit in find_hits(held_out, (one.text for one in pool.documents), progress)}
        pool.documents = [document for i, document in enumerate(pool.documents) if i not in hit]
        pool.tally.steps["held-out text"] = len(pool.documents)


def _nothing_left(pool: _Pool) -> str:
    rows = list(pool.tally.steps.items())
    lost = [f"{before - after:,} by {step}" for (_, before), (step, after) in pairwise(rows) if after < before]
    why = f"of its {rows[0][1]:,} documents ({', '.join(lost)})"
    return f"{pool.source.name}: nothing is left {why}: loosen the filters, or leave the source out"


def _tokenize(tokenizer: Tokenizer, pools: list[_Pool], progress: Progress) -> None:
    progress.start("tokenizing", sum(len(pool.documents) for pool in pools))
    for pool in pools:
        for start in range(0, len(pool.documents), _TOKENIZE):
            texts = [document.text for document in pool.documents[start : start + _TOKENIZE]]
            pool.ids += [np.array(ids, dtype=np.int32) for ids in text_ids(tokenizer, texts)]
            progress.advance(len(texts))


def _facts(spec: SetSpec, pools: list[_Pool], pieces: list[Piece], shares: list[float]) -> dict[str, Any]:
    """Rows for each source, and the tokens by kind of text."""
    total = sum(len(piece.ids) for piece in pieces)
    kinds = {"text": 0, "instruction": 0, "chat": 0}
    rows = []
    for number, (pool, share) in enumerate(zip(pools, shares)):
        mine = [piece for piece in pieces if piece.source == number]
        tokens = sum(len(piece.ids) for piece in mine)
        for piece in mine:
            kinds[pool.documents[piece.document].kind] += len(piece.ids)
        rows.append(
            {
                **pool.facts,
                "weight_given": pool.source.weight,
                "weight": round(share, 6),
                "share": round(tokens / total, 6),
                "tokens": tokens,
                "sequences": len(mine),
                "used_documents": len({piece.document for piece in mine}),
                "steps": [{"step": step, "documents": count} for step, count in pool.tally.steps.items()],
            }
        )
    return {"sources": rows, "kinds": kinds}


def _headed(ids: list[int], head: list[int]) -> list[int]:
    return ids if ids[: len(head)] == head else head + ids
