"""Reads the data files of this room."""

from __future__ import annotations

import difflib
import functools
from importlib import resources
from typing import Any

import yaml

from halfbyte.errors import UsageError
from halfbyte.platforms.schema import Platform, Quirk, VllmFacts, version_tuple, within

FACTS = "vllm"


def list_platforms() -> list[str]:
    """Names of every platform there is data for, sorted."""
    names = (item.name for item in resources.files(__package__).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and name != f"{FACTS}.yaml")


@functools.cache
def load_platform(name: str) -> Platform:
    """The platform of that name, in any case ("H100"). Raises UsageError that lists the known ones."""
    known = list_platforms()
    folded = name.strip().casefold()
    if folded not in known:
        close = difflib.get_close_matches(folded, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}? Known: " if close else "use "
        raise UsageError(f"unknown platform {name!r}: {hint}{', '.join(known)}")
    return Platform.model_validate(_read(folded))


def facts_for(vllm_version: str | None = None) -> VllmFacts:
    """The facts of a vLLM version ("0.32.0+cpu"); None: the newest in which something was measured.

    A version outside every range gets the nearest range's facts, with `notice` saying so.
    Raises UsageError for a word that is no version.
    """
    ranges = _ranges()
    if vllm_version is None:
        measured = [v for facts in ranges for v, how in facts.seen.items() if how.startswith("measured")]
        vllm_version = max(measured, key=version_tuple)
    try:
        version = version_tuple(vllm_version)
    except ValueError:
        raise UsageError(f"{vllm_version!r} is no vLLM version: write it like 0.26.0") from None
    quirks = tuple(quirk for quirk in _quirks() if within(quirk.since, vllm_version, quirk.before))
    for facts in ranges:
        if within(facts.since, vllm_version, facts.before):
            return facts.model_copy(update={"quirks": quirks})
    older = version < version_tuple(ranges[0].since)
    nearest = ranges[0] if older else ranges[-1]
    notice = (
        f"vLLM {vllm_version} is {'older' if older else 'newer'} than any seen here "
        f"({ranges[0].since} to before {ranges[-1].before}): the facts of {nearest.since} are assumed"
    )
    return nearest.model_copy(update={"quirks": quirks, "notice": notice})


@functools.cache
def _ranges() -> tuple[VllmFacts, ...]:
    data = _read(FACTS)
    ranges = (VllmFacts.model_validate({**data["common"], **tree}) for tree in data["ranges"])
    return tuple(sorted(ranges, key=lambda facts: version_tuple(facts.since)))


@functools.cache
def _quirks() -> tuple[Quirk, ...]:
    return tuple(Quirk.model_validate(tree) for tree in _read(FACTS)["quirks"])


def _read(name: str) -> dict[str, Any]:
    text = resources.files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return {key: value for key, value in yaml.safe_load(text).items() if not key.startswith("x-")}
