"""Reads the data files of this room."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from halfbyte.errors import UsageError
from halfbyte.platforms.base import measured_on, merged, version_tuple, within
from halfbyte.platforms.evidence import load_evidence, parse_mapping, problems
from halfbyte.platforms.schema import Platform, Quirk, VllmFacts

FACTS = "vllm"


def list_platforms() -> list[str]:
    """Names of every platform there is data for, sorted."""
    names = (item.name for item in resources.files(__package__).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml") and name != f"{FACTS}.yaml")


def load_platform(name: str, evidence: Iterable[Path] = ()) -> Platform:
    """The platform of that name, in any case ("H100"), or of a YAML file of the user's own, with its speed evidence.

    A file may say `like: NAME` and then states only what differs; speed evidence is not inherited, since it belongs to
    a device. With `ranked_by: NAME` that platform's evidence ranks kernels here, after what was measured here.
    `evidence`: the user's evidence files and directories, beside halfbyte's own.
    Raises UsageError that lists the known names, or says what is wrong with a file.
    """
    platform = _from_file(Path(name)) if _is_file(name) else _known(name)
    if platform.ranked_by:
        _named(platform.ranked_by, f"platform {name}: ranked_by: ")
    tables = load_evidence(evidence)
    own = [table for table in tables if table.device.casefold() == platform.name.casefold()]
    lent = [table for table in tables if table.device.casefold() == platform.ranked_by.casefold()]
    lent = [table.model_copy(update={"lent": True}) for table in lent]
    return platform.model_copy(update={"speed": (*own, *lent)})


@functools.cache
def _known(name: str) -> Platform:
    folded = _named(name, more=", or a YAML file")
    return _validated(_read(folded), folded)


def _named(name: str, where: str = "", more: str = "") -> str:
    """The name of a platform that there is data for, as it is written. Raises UsageError, which begins with `where`."""
    known, folded = list_platforms(), name.strip().casefold()
    if folded not in known:
        close = difflib.get_close_matches(folded, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}? Known: " if close else "use "
        raise UsageError(f"{where}unknown platform {name!r}: {hint}{', '.join(known)}{more}")
    return folded


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or "/" in name


def _from_file(path: Path) -> Platform:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"platform {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    tree = parse_mapping(text, f"platform {path}")
    name = str(tree.get("name", "")).strip()
    if not name or name.casefold() in list_platforms():
        what = f"{name} is one that there is data for" if name else "it has none"
        raise UsageError(f"platform {path}: give it a name of its own ({what}): name: my-gpu")
    return _validated(tree, str(path))


def _validated(tree: dict[str, Any], source: str) -> Platform:
    base = tree.pop("like", None)
    if base is not None:
        parent = _known(_named(str(base), f"platform {source}: like: "))
        theirs = parent.model_dump(mode="json", exclude={"speed", "ranked_by"})
        tree = merged(measured_on(theirs, parent.name), tree)
    try:
        return Platform.model_validate(tree)
    except ValidationError as error:
        raise UsageError(f"platform {source}: {problems(error)}") from None


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
    return parse_mapping(text, f"{name}.yaml")
