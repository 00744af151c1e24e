"""The mitigation ladder (mitigation.yaml): which step comes next when a gate failed, and what it makes of a recipe."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import Field

from halfbyte.errors import UsageError
from halfbyte.experiments.axes import nested
from halfbyte.platforms.base import KV_FLAG, Data, merged
from halfbyte.recipe import CalibrationSpec, Recipe
from halfbyte.recipe.loader import recipe_from_mapping

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


class Move(Data):
    """One step: from these values of the rung's key (or a number below that; neither: from any) to these settings."""

    source: tuple[Any, ...] | None = Field(default=None, alias="from")
    below: float | None = None
    to: dict[str, Any]

    def starts_at(self, present: Any) -> bool:
        """Whether it may be made from that value of the key."""
        if self.below is not None:
            return isinstance(present, (int, float)) and present < self.below
        return self.source is None or present in self.source


class Rung(Data):
    """A row of mitigation.yaml, where the fields are explained."""

    rung: str
    title: str
    why: str
    cost: str
    gates: tuple[str, ...]
    unless: tuple[str, ...] = ()
    grids: tuple[str, ...] = ()
    target: Literal["recipe", "calibration", "linears", "serve"]
    key: str
    moves: tuple[Move, ...]
    once: bool = False
    source: str

    def answers(self, failed: Iterable[str]) -> list[str]:
        """Those of the failed gates that it is there for; none where `unless` stands against it."""
        failed = list(failed)
        if _matching(failed, self.unless):
            return []
        return _matching(failed, self.gates)


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


@functools.cache
def ladder() -> tuple[Rung, ...]:
    """The rungs, cheapest first."""
    text = resources.files("halfbyte.experiments").joinpath("mitigation.yaml").read_text(encoding="utf-8")
    return tuple(Rung.model_validate(row) for row in yaml.safe_load(text))


@dataclass(frozen=True)
class Candidate:
    """What is made and how it is served. `calibration`: how much text; `kv_cache`: what --kv-cache-dtype is set to in
    the place of the platform's own; None: it stays."""

    recipe: Recipe
    calibration: CalibrationSpec
    kv_cache: str | None = None

    def plain(self) -> dict[str, Any]:
        """As mitigation.json holds it."""
        return {
            "recipe": self.recipe.identity(),
            "calibration": self.calibration.model_dump(),
            "kv_cache": self.kv_cache,
        }

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Candidate:
        """What `plain` gave."""
        recipe = Recipe.model_validate(tree["recipe"])
        return cls(recipe, CalibrationSpec.model_validate(tree["calibration"]), tree["kv_cache"])

    def settings(self, target: str) -> dict[str, Any]:
        """What rungs with that target change, by key; nested keys with dots."""
        if target == "calibration":
            return self.calibration.model_dump()
        if target == "serve":
            return {KV_FLAG: self.kv_cache}
        return _flat(self.recipe.identity())

    def moved(self, target: str, to: Mapping[str, Any]) -> Candidate:
        """With those settings changed. Raises UsageError for a recipe that cannot be."""
        if target == "serve":
            return replace(self, kv_cache=to[KV_FLAG])
        if target == "calibration":
            spec = self.calibration.model_copy(update=dict(to))
            return replace(self, recipe=self.recipe.model_copy(update={"calibration": spec}), calibration=spec)
        tree = self.recipe.model_dump(mode="json")
        for key, value in to.items():
            tree = merged(tree, nested(key, value))
        return replace(self, recipe=recipe_from_mapping(tree, "mitigation"))


@dataclass(frozen=True)
class Step:
    """A move of a rung that applies now. `name` tells it from every other step of a climb."""

    rung: Rung
    move: Move
    answers: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.rung.rung}:{','.join(f'{key}={value}' for key, value in self.move.to.items())}"


def next_step(candidate: Candidate, failed: Iterable[str], tried: Collection[str]) -> Step | None:
    """The cheapest step that answers one of the failed gates and was not tried; None: the ladder ends.

    failed   names of gates.json's rows that failed
    tried    names of the steps that were made
    """
    failed = list(failed)
    for rung in ladder():
        answers = rung.answers(failed)
        fits = not rung.grids or candidate.recipe.grid in rung.grids
        if not answers or not fits or (rung.once and any(name.split(":")[0] == rung.rung for name in tried)):
            continue
        present = candidate.settings(rung.target).get(rung.key)
        for move in rung.moves:
            step = Step(rung, move, tuple(answers))
            if step.name not in tried and move.starts_at(present):
                return step
    return None


def take(step: Step, candidate: Candidate, linears: Callable[[Candidate], Sequence[str]]) -> Candidate:
    """The candidate after the step; `linears` names those that are to stay in BF16. Raises UsageError where it cannot
    be."""
    if step.rung.target != "linears":
        return candidate.moved(step.rung.target, step.move.to)
    return candidate.moved("recipe", {"ignore": [*candidate.recipe.ignore, *linears(candidate)]})


def changes(before: Candidate, after: Candidate) -> dict[str, list[Any]]:
    """What differs, {key: [from, to]}; how much calibration text as calibration.sequences, vLLM's flags by name."""
    pairs = [(_all(before), _all(after))]
    return {key: [old[key], new[key]] for old, new in pairs for key in new if old[key] != new[key]}


def _all(candidate: Candidate) -> dict[str, Any]:
    recipe = candidate.settings("recipe")
    spec = {f"calibration.{key}": value for key, value in candidate.settings("calibration").items()}
    return {**recipe, **spec, **candidate.settings("serve")}


def change_words(found: Mapping[str, Sequence[Any]]) -> str:
    """Changes as a reader wants them: `group_size 128 -> 64`."""
    return ", ".join(f"{key} {_short(key, old, new)}" for key, (old, new) in found.items())


def _short(key: str, old: Any, new: Any) -> str:
    if isinstance(new, list):
        return f"+{len(new) - len(old)} linears"
    return f"{'as the platform has it' if old is None else old} -> {new}"


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return rows


@dataclass(frozen=True)
class Budget:
    """What linears kept in BF16 may cost: `bits` a weight that the recipe quantizes, or `bytes` more."""

    bits: float | None = None
    bytes: int | None = None


def parse_budget(text: str) -> Budget:
    """`4.6` (bits a quantized weight, all counted) or `64MiB` (bytes more). Raises UsageError in one line."""
    number, unit = _measure(text, f"--budget {text}: write bits a weight, such as 4.6, or bytes, such as 64MiB")
    return Budget(bytes=int(number * UNITS[unit])) if unit else Budget(bits=number)


def parse_bytes(text: str, option: str) -> int:
    """`12GiB` in bytes. Raises UsageError in one line that names the option."""
    number, unit = _measure(text, wrong := f"{option} {text}: write bytes with their unit, such as 12GiB")
    if not unit:
        raise UsageError(wrong)
    return int(number * UNITS[unit])


def _measure(text: str, wrong: str) -> tuple[float, str]:
    """A number above 0 and its unit, a key of UNITS ("": none)."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].casefold() not in UNITS or float(found[1]) <= 0:
        raise UsageError(wrong)
    return float(found[1]), found[2].casefold()
