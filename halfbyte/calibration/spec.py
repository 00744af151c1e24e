"""What a calibration set is to be made of: sources with weights, filters, sizes; from words or from a YAML file."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from halfbyte.calibration.languages import LANGUAGES
from halfbyte.errors import UsageError
from halfbyte.recipe.loader import read_yaml

SUFFIXES = (".yaml", ".yml")
HUB = "hub:"
HUB_LIMIT = 50_000
"""Documents read from a hub data set where no limit is given: they are read in the order the data set has them."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """Where documents come from: a local file or a data set of the hub."""

    path: str | None = Field(default=None, description="a text, JSONL or Parquet file")
    dataset: str | None = Field(default=None, description="a data set's id on the hub")
    config: str | None = Field(default=None, description="the data set's configuration")
    split: str = Field(default="train", description="the data set's split")
    revision: str | None = Field(default=None, description="the data set's commit, tag or branch")
    field: str | None = Field(default=None, description="the field that holds text or messages")
    weight: float | None = Field(default=None, description="share of the tokens; the weights are normalised")
    in_domain: bool = Field(default=False, description="whether this is text of the target tasks")
    limit: int | None = Field(default=None, ge=1, description="documents read at most")

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("a source has a path or a dataset, one of the two")
        if self.dataset is None and (self.config or self.revision):
            raise ValueError("config and revision belong to a dataset of the hub, not to a path")
        if self.weight is not None and not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight {self.weight:g} of {self.name}: give a number above 0, or leave the source out")
        return self

    @property
    def name(self) -> str:
        """The file's name or the data set's id."""
        if self.path is not None:
            return Path(self.path).name
        return f"{self.dataset}{f'/{self.config}' if self.config else ''}"


class SetSpec(_Strict):
    """A whole calibration set."""

    sources: tuple[Source, ...] = Field(default=(), description="where documents come from; none: the model writes")
    sequences: int = Field(default=128, ge=1, description="sequences (the strategy: 128-512)")
    max_tokens: int = Field(default=512, ge=16, description="tokens of the longest sequence: the target context")
    seed: int = Field(default=0, description="seed of sampling")
    languages: tuple[str, ...] = Field(default=(), description="ISO 639-1 codes to keep; none: all")
    min_chars: int = Field(default=64, ge=1, description="documents shorter than this are left out")
    max_chars: int | None = Field(default=None, ge=1, description="documents longer than this are left out")
    near_duplicates: float | None = Field(
        default=0.8, description="Jaccard similarity of word 5-grams from which two documents count as one; null: off"
    )
    held_out: tuple[str, ...] = Field(default=(), description="evaluation text that must not occur in the set")

    @field_validator("near_duplicates", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return None if value is False else value

    @field_validator("near_duplicates", mode="after")
    @classmethod
    def _share(cls, value: float | None) -> float | None:
        if value is not None and not 0.3 <= value < 1:
            raise ValueError("give a similarity from 0.3 up to, not including, 1, or null for off")
        return value

    @field_validator("languages", mode="after")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in LANGUAGES:
                raise ValueError(f"{name!r} cannot be told apart: use {', '.join(LANGUAGES)}")
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _weights(self) -> SetSpec:
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            bare = self.sources[given.index(False)].name
            raise ValueError(f"{bare} has no weight and others have: give every source one, or none")
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars {self.max_chars} is below min_chars {self.min_chars}")
        return self

    def shares(self) -> list[float]:
        """Each source's share of the tokens: the weights, normalised; equal where none are given."""
        weights = [source.weight or 1.0 for source in self.sources]
        return [weight / math.fsum(weights) for weight in weights]


def parse_source(word: str) -> Source:
    """A source from one word: PLACE[:OPTION]..., e.g. "c4.jsonl:0.7", "mine.jsonl:0.3:in-domain", "hub:ORG/NAME:0.2".

    PLACE is a file or hub:DATASET; an option is a weight, `in-domain`, or KEY=VALUE with field, split, config,
    revision or limit. Raises UsageError.
    """
    hub = word.startswith(HUB)
    parts = word.removeprefix(HUB).split(":")
    ends = [1] if hub else range(len(parts), 0, -1)
    end = next((end for end in ends if hub or Path(":".join(parts[:end])).exists()), 1)
    tree: dict[str, Any] = {"dataset" if hub else "path": ":".join(parts[:end])}
    for option in parts[end:]:
        key, value = _option(option, word)
        if key in tree:
            raise UsageError(f"{word}: {key} is given twice")
        tree[key] = value
    return _validated(Source, tree, word)


def read_spec(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file, its relative paths taken from where the file lies. Raises UsageError."""
    tree = read_yaml(path)
    if not isinstance(tree, dict) or not isinstance(tree.get("sources"), list) or not tree["sources"]:
        raise UsageError(f"{path}: give a list `sources`, such as `sources: [{{path: mine.jsonl, in_domain: true}}]`")
    tree["sources"] = [_placed(source, path.parent) for source in tree["sources"]]
    if isinstance(tree.get("held_out"), str):
        tree["held_out"] = [tree["held_out"]]
    if isinstance(tree.get("held_out"), list):
        tree["held_out"] = [str(path.parent / str(word)) for word in tree["held_out"]]
    return tree


def spec_from_mapping(tree: Mapping[str, Any], source: str) -> SetSpec:
    """The spec that a plain mapping spells; `source` names it in the UsageError that a wrong key raises."""
    return _validated(SetSpec, tree, source)


def spec_from_words(words: Sequence[str], defaults: Mapping[str, Any] | None = None, **options: Any) -> SetSpec:
    """The spec of a command line: either one YAML file or sources. Options (those that are not None) beat the file,
    the file beats `defaults`.

    Raises UsageError for a file beside other sources, and for whatever is wrong in them.
    """
    given = {key: value for key, value in options.items() if value is not None}
    files = [word for word in words if word.endswith(SUFFIXES)]
    if files and len(words) > 1:
        raise UsageError(f"{files[0]} is a list of sources itself: put the others into it, or leave it out")
    tree = read_spec(Path(files[0])) if files else {"sources": [parse_source(word) for word in words]}
    return spec_from_mapping({**(defaults or {}), **tree, **given}, files[0] if files else "calibrate")


def _option(option: str, word: str) -> tuple[str, Any]:
    key, equals, value = option.partition("=")
    keys = ("field", "split", "config", "revision", "limit")
    if equals and key in keys and value:
        return key, value
    if option == "in-domain":
        return "in_domain", True
    try:
        return "weight", float(option)
    except ValueError:
        close = difflib.get_close_matches(key, [*keys, "in-domain"], n=1, cutoff=0.5)
        hint = (
            f"did you mean {close[0]!r}?" if close else "use a weight, in-domain, " + ", ".join(f"{k}=" for k in keys)
        )
        raise UsageError(f"{word}: {option!r} is no option of a source: {hint}") from None


def _placed(source: object, base: Path) -> object:
    if isinstance(source, str):
        source = {"dataset": source.removeprefix(HUB)} if source.startswith(HUB) else {"path": source}
    if isinstance(source, dict) and isinstance(source.get("path"), str):
        return {**source, "path": str(base / source["path"])}
    return source


def _validated(model: Any, tree: Mapping[str, Any], source: str) -> Any:
    try:
        return model.model_validate(dict(tree))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            name = str(problem["loc"][-1])
            known = list((Source if len(problem["loc"]) > 1 else model).model_fields)
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else "use one of " + ", ".join(known)
            raise UsageError(f"{source}: unknown key {where!r}: {hint}") from None
        message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
        raise UsageError(f"{source}: {f'{where}: ' if where else ''}{message}") from None
