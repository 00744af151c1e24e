"""BF16 references kept in the cache, so that a model is run once on a text whatever number of artifacts meets it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.reference import NOISE_TOKENS, RESULT, Reference, found, reference_key, reference_of
from halfbyte.evaluate.windows import Windows
from halfbyte.files import locked
from halfbyte.models import cache_dir
from halfbyte.types import Progress, Quiet

LIMIT_GIB = 8.0
LIMIT = "HALFBYTE_REFERENCES_GIB"
"""The environment variable that sets how much all kept references may take, in GiB; 0 keeps none."""


def cached_reference(
    load: Callable[[], Any],
    windows: Windows,
    fingerprint: str,
    device: str,
    *,
    noise_tokens: int = NOISE_TOKENS,
    progress: Progress | None = None,
) -> Reference:
    """The reference of a BF16 model on `windows`: from the cache, or made and kept there.

    load          gives the model; called only where nothing is kept
    fingerprint   names its contents (Checkpoint.fingerprint)
    A cache that cannot be written costs a notice. The least recently used references go when all are over the limit.
    """
    progress, limit = progress or Quiet(), _limit()
    key = reference_key(windows, f"{fingerprint}:{device.partition(':')[0]}", noise_tokens=noise_tokens)
    place = references_dir() / key[:32]
    there = found(place, key)
    if there is not None:
        progress.say("BF16's side of the comparison is in the cache: it is not run again")
        _touch(place)
        return there
    made = reference_of(load(), windows, noise_tokens=noise_tokens, key=key, progress=progress)
    if made.facts["bytes"] > limit:
        return made
    try:
        _keep(made, place)
        evict(limit, keep=place)
    except HalfbyteError as error:
        progress.say(f"BF16's side of the comparison is not kept: {error}")
    return made


def _keep(made: Reference, place: Path) -> None:
    """Write it whole, or leave nothing that takes room."""
    with locked(place):
        try:
            for old in place.iterdir():
                old.unlink()
            made.save(place)
        except HalfbyteError:
            shutil.rmtree(place, ignore_errors=True)
            raise


def references_dir() -> Path:
    """Where references are kept, a directory each."""
    return cache_dir() / "references"


def evict(limit: int, keep: Path | None = None) -> list[Path]:
    """Remove references, the least recently used first, until all take at most `limit` bytes; returns those that went.

    keep   stays in any case
    """
    kept = [place for place in references_dir().glob("*") if place.is_dir()]
    sizes = {place: sum(file.stat().st_size for file in place.iterdir()) for place in kept}
    total, gone = sum(sizes.values()), []
    for place in sorted(kept, key=_used):
        if total <= limit:
            break
        if place != keep:
            shutil.rmtree(place, ignore_errors=True)
            total -= sizes[place]
            gone.append(place)
    return gone


def _limit() -> int:
    text = os.environ.get(LIMIT) or str(LIMIT_GIB)
    try:
        gib = float(text)
        if not 0 <= gib < 1e9:
            raise ValueError(text)
    except ValueError as error:
        raise UsageError(f"{LIMIT}={text} is no number of GiB: set such as 8, or 0 to keep none") from error
    return int(gib * (1 << 30))


def _touch(place: Path) -> None:
    with suppress(OSError):
        os.utime(place / RESULT)


def _used(place: Path) -> float:
    """When a reference was last used, or written to while it is not whole; 0 for one that has just gone."""
    for path in (place / RESULT, place):
        with suppress(OSError):
            return path.stat().st_mtime
    return 0.0
