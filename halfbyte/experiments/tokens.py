"""The calibration tokens that an artifact was made with, found again by their SHA-256.

They are no part of an artifact: it would carry its maker's text to wherever it is published. A set that was given as a
directory is found there, a run's and a sweep's in their directories; what was cut from text for one artifact is kept in
the cache; and a set that the model wrote is written again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from halfbyte.calibration import CalibrationSet, build
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.models import cache_dir
from halfbyte.recipe import CalibrationSpec
from halfbyte.types import Progress

MOST_TOKENS = 1 << 24
"""A larger set is not kept in the cache (4 bytes a token)."""


def keep_tokens(data: CalibrationSet | None) -> None:
    """Keep a set in the cache under its SHA-256. A cache that cannot be written is no error: the set is there."""
    if data is not None and data.tokens <= MOST_TOKENS and not (_place(data.sha256) / "manifest.json").is_file():
        with suppress(HalfbyteError):
            data.save(_place(data.sha256))


def find_tokens(
    described: Mapping[str, Any],
    near: Path,
    path: str | None,
    given: Sequence[Path],
    rebuild: Any,
    tokenizer: Any,
    progress: Progress | None = None,
) -> CalibrationSet:
    """The set that a manifest describes (its "calibration"), with the very tokens.

    near        the artifact's directory; a run keeps the set beside it, a sweep its sets beside the cells
    path        the set's directory as seen from there, where it was given as one
    given       what the user names: a set's directory, or the text files that it was cut from; none: look for it
    rebuild     rebuild(spec) gives the set that the model writes itself
    tokenizer   tokenizer() gives the model's tokenizer, for text files
    Raises HalfbyteError where the tokens are not found, or are others.
    """
    sha256 = str(described.get("sha256"))
    if given:
        data = _from_given(described, given, tokenizer, progress)
        if data.sha256 != sha256:
            what = ", ".join(path.name for path in given)
            raise HalfbyteError(f"{what} gives other tokens ({data.sha256[:12]}) than the manifest's ({sha256[:12]})")
        return data
    beside = [
        *([near / path] if path else []),
        near.parent / "calibration",
        *sorted((near.parent.parent / "calibration").glob("*")),
    ]
    for place in (*beside, _place(sha256)):
        kept = _there(place)
        if kept is not None and kept.sha256 == sha256:
            return kept
    if _kind(described) == "self-generated":
        data = rebuild(_spec(described))
        if data.sha256 == sha256:
            return data
        raise HalfbyteError(
            "the model writes other text here than it was calibrated on (other versions or another machine): "
            "name the kept set with --calibration DIR"
        )
    raise HalfbyteError(
        f"the calibration tokens {sha256[:12]} are not on this machine: name the set's directory or the text "
        f"with --calibration ({_wanted(described)})"
    )


def _from_given(
    described: Mapping[str, Any], given: Sequence[Path], tokenizer: Any, progress: Progress | None
) -> CalibrationSet:
    if len(given) == 1 and given[0].is_dir():
        return CalibrationSet.load(given[0])
    how, source = described.get("strategy"), described.get("source")
    if how not in ("mixed", "stream") or not isinstance(source, Mapping):
        raise UsageError("a curated set is not cut again from its text here: name the set's directory")
    portion = source.get("portion") or (0.0, 1.0)
    low, high = float(portion[0]), float(portion[1])
    return build(tokenizer(), _spec(described), sources=given, strategy=how, portion=(low, high), progress=progress)


def _spec(described: Mapping[str, Any]) -> CalibrationSpec:
    """What the set was asked for. Raises HalfbyteError where the manifest does not say."""
    asked = described.get("asked")
    try:
        return CalibrationSpec(seed=described["seed"], **dict(asked or {}))
    except (KeyError, TypeError, ValueError) as error:
        raise HalfbyteError("the manifest does not say how its calibration set was made: name the set") from error


def _there(place: Path) -> CalibrationSet | None:
    try:
        return CalibrationSet.load(place) if (place / "manifest.json").is_file() else None
    except HalfbyteError:
        return None


def _kind(described: Mapping[str, Any]) -> Any:
    source = described.get("source")
    return source.get("kind") if isinstance(source, Mapping) else None


def _wanted(described: Mapping[str, Any]) -> str:
    """The names of the text files, where the manifest says them."""
    source = described.get("source")
    files = source.get("files") if isinstance(source, Mapping) else None
    names = [str(f.get("file") if isinstance(f, Mapping) else f) for f in files or []]
    return "it was made of " + ", ".join(names) if names else "its source is not stated"


def _place(sha256: str) -> Path:
    return cache_dir() / "tokens" / sha256[:32]
