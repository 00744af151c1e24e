"""A calibration set from its spec, with all that the manifest tells of it: what `halfbyte calibrate` makes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from halfbyte import __version__
from halfbyte.calibration import near
from halfbyte.calibration.build import build
from halfbyte.calibration.curate import curate
from halfbyte.calibration.heldout import HeldOut, contamination, read_held_out, texts_of
from halfbyte.calibration.quality import coverage, diversity, warnings
from halfbyte.calibration.readers import kind_of_file
from halfbyte.calibration.spec import SetSpec
from halfbyte.calibration.store import CalibrationSet
from halfbyte.calibration.tokens import Tokenizer, tokenizer_sha256
from halfbyte.errors import UsageError
from halfbyte.recipe.schema import CalibrationSpec, Method
from halfbyte.types import Progress, Quiet

Strategy = Literal["curated", "mixed", "stream"]
OnHeldOut = Literal["refuse", "drop", "allow"]
_FILTERS = {
    "languages": "--language",
    "near_duplicates": "--near-duplicates",
    "min_chars": "min_chars",
    "max_chars": "max_chars",
}
_UNKNOWN_LENGTH = 1_000_000
"""From here on, a tokenizer's model_max_length says that nobody set it."""


def make_set(
    tokenizer: Tokenizer,
    spec: SetSpec,
    *,
    strategy: Strategy = "curated",
    writer: Callable[[], Any] | None = None,
    on_held_out: OnHeldOut = "refuse",
    methods: Collection[Method] = (),
    progress: Progress | None = None,
) -> CalibrationSet:
    """A calibration set and its manifest, the same bytes for the same spec, sources, tokenizer and libraries.

    strategy     "curated": sources filtered, weighted, in mixed lengths. "mixed", "stream": text and JSONL files as
                 they are, as `build` cuts them. Without sources the model writes, whatever the strategy.
    writer       gives the model (a transformers causal LM) that writes where there are no sources.
    on_held_out  what happens to text that shares n-grams with spec.held_out: an error, left out, or told only.
    methods      what the set is meant for; the guide's ranges are those of these methods, or all.
    Raises UsageError and HalfbyteError, each one line.
    """
    progress = progress or Quiet()
    _check(spec, strategy, on_held_out)
    held_out = read_held_out(spec.held_out, tokenizer, progress) if spec.held_out else None
    against: dict[str, np.ndarray | None] = {"candidates": None, "in_domain": None}
    if spec.sources and strategy == "curated":
        made = curate(tokenizer, spec, held_out if on_held_out == "drop" else None, progress)
        data = CalibrationSet.of(made.sequences, _facts(spec, tokenizer) | made.facts)
        against = {"candidates": made.candidate_tokens, "in_domain": made.in_domain_tokens}
    else:
        own = CalibrationSpec(sequences=spec.sequences, max_tokens=spec.max_tokens, seed=spec.seed)
        paths = [source.path for source in spec.sources if source.path is not None]
        how: Literal["mixed", "stream"] = "stream" if strategy == "stream" else "mixed"
        model = None if paths or writer is None else writer()
        data = build(tokenizer, own, sources=paths, model=model, strategy=how, progress=progress)
    return _judged(data, tokenizer, spec, held_out, against, on_held_out, methods, progress)


def _judged(
    data: CalibrationSet,
    tokenizer: Tokenizer,
    spec: SetSpec,
    held_out: HeldOut | None,
    against: Mapping[str, np.ndarray | None],
    on_held_out: OnHeldOut,
    methods: Collection[Method],
    progress: Progress,
) -> CalibrationSet:
    """The set with coverage, diversity, contamination and warnings in its manifest."""
    texts = texts_of(data.sequences, tokenizer)
    manifest = dict(data.manifest)
    manifest["coverage"] = coverage(
        data.sequences, len(tokenizer), {**against, "held_out": held_out.tokens if held_out else None}
    )
    manifest["diversity"] = diversity(data.sequences, texts)
    manifest["contamination"] = None
    if held_out is not None:
        dropped = _dropped(manifest) if on_held_out == "drop" else None
        manifest["contamination"] = contamination(held_out, texts, on_held_out == "allow", dropped, progress)
    possible = getattr(tokenizer, "model_max_length", None)
    manifest["warnings"] = warnings(
        manifest,
        spec,
        methods,
        chat=bool(tokenizer.chat_template),
        longest_possible=possible if isinstance(possible, int) and possible < _UNKNOWN_LENGTH else None,
    )
    manifest["versions"] = _versions(spec, manifest["strategy"] == "curated")
    return CalibrationSet(data.sequences, manifest, data.sampled)


def _facts(spec: SetSpec, tokenizer: Tokenizer) -> dict[str, Any]:
    near_duplicates = {
        "jaccard": spec.near_duplicates,
        "shingle_words": near.SHINGLE,
        "permutations": near.PERMUTATIONS,
    }
    return {
        "strategy": "curated",
        "asked": {"sequences": spec.sequences, "max_tokens": spec.max_tokens},
        "seed": spec.seed,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "source": {"kind": "text", "files": [source.name for source in spec.sources]},
        "filters": {
            "languages": list(spec.languages),
            "min_chars": spec.min_chars,
            "max_chars": spec.max_chars,
            "near_duplicates": near_duplicates if spec.near_duplicates is not None else None,
        },
    }


def _check(spec: SetSpec, strategy: Strategy, on_held_out: OnHeldOut) -> None:
    """Refuse what a strategy cannot do, before anything is read."""
    if on_held_out != "refuse" and not spec.held_out:
        raise UsageError("there is no text to look for: name the evaluation text with --held-out")
    filters = [_FILTERS[key] for key in sorted(spec.model_fields_set & set(_FILTERS))]
    if on_held_out == "drop":
        filters.append("--drop-contaminated")
    if not spec.sources and (filters or strategy == "stream"):
        what = ", ".join(filters) or "--strategy stream"
        raise UsageError(f"{what} is for text that is given, and the model writes its own here: name sources")
    if strategy == "curated":
        return
    if filters:
        raise UsageError(f"--strategy {strategy} filters nothing, and {filters[0]} is given: use --strategy curated")
    for source in spec.sources:
        more = sorted(source.model_fields_set - {"path"})
        if source.path is not None and kind_of_file(Path(source.path)) == "parquet":
            more.append("Parquet columns")
        if more:
            raise UsageError(
                f"--strategy {strategy} takes text and JSONL files as they are, and {source.name} comes with "
                f"{more[0]}: use --strategy curated"
            )


def _dropped(manifest: Mapping[str, Any]) -> int:
    """Documents that were left out because they share n-grams with the held-out text."""
    total = 0
    for row in manifest["sources"]:
        counts = [step["documents"] for step in row["steps"]]
        at = next(i for i, step in enumerate(row["steps"]) if step["step"] == "held-out text")
        total += counts[at - 1] - counts[at]
    return total


def _versions(spec: SetSpec, curated: bool) -> dict[str, str]:
    """What the bytes of a set depend on beside its sources."""
    found = {"halfbyte": __version__, "python": ".".join(map(str, sys.version_info[:2]))}
    names = ["numpy", "tokenizers", "transformers"]
    if curated:
        kinds = {"hub" if source.path is None else kind_of_file(Path(source.path)) for source in spec.sources}
        names += ["datasets"] * ("hub" in kinds) + ["pyarrow"] * ("parquet" in kinds)
        names += ["datasketch"] * (spec.near_duplicates is not None)
    return found | {name: version(name) for name in sorted(names)}
