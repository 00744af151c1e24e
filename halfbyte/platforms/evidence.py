"""Reads evidence files: those that come with halfbyte, and the user's own (YAML or JSON, a file or a directory)."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from halfbyte.errors import UsageError
from halfbyte.platforms.schema import Platform
from halfbyte.platforms.speed import SpeedTable

SUFFIXES = (".yaml", ".yml", ".json")


def load_evidence(paths: Iterable[Path] = ()) -> tuple[SpeedTable, ...]:
    """Every speed table: halfbyte's own and those of `paths` (files, or directories of files), newest first.

    Of two of one day the user's comes first. A directory that does not exist holds none. Raises UsageError in one
    line for a file that is missing, broken or no evidence.
    """
    theirs = [read_table(file) for path in paths for file in _files(path)]
    return tuple(sorted([*theirs, *_own()], key=lambda table: table.date, reverse=True))


def unused(paths: Iterable[Path], platforms: Sequence[Platform], hint: str = "") -> list[str]:
    """What of these files and directories says nothing of the platforms, a line each. `hint`: what to do where it is of
    another vLLM."""
    told = []
    for path in paths:
        files = _files(path)
        told += [] if files else [f"evidence {path} holds no file ({', '.join(SUFFIXES)})"]
        for file in files:
            table = read_table(file)
            device = table.device.casefold()
            mine = [p for p in platforms if device in (p.name.casefold(), p.ranked_by.casefold())]
            if not mine:
                here = " or ".join(platform.name for platform in platforms)
                told.append(f"evidence {file} is of {table.device}, not of {here}: it is not used")
            elif not any(table.covers(platform.vllm) for platform in mine):
                here = " and ".join(dict.fromkeys(platform.vllm for platform in mine))
                what = f"is of vLLM {table.vllm}, and this speaks of {here}"
                told.append(f"evidence {file} {what}: it is not used{hint}")
    return told


def read_table(file: Path) -> SpeedTable:
    """One evidence file, checked. Raises UsageError in one line."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"evidence {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse_table(text, str(file))


def parse_table(text: str, source: str) -> SpeedTable:
    """The table that YAML or JSON text spells; `source` names it in the UsageError that a wrong key raises."""
    tree = parse_mapping(text, f"evidence {source}")
    if tree.get("kind") != "speed":
        raise UsageError(f"evidence {source}: it is no evidence file, which says kind: speed")
    try:
        return SpeedTable.model_validate(tree)
    except ValidationError as error:
        raise UsageError(f"evidence {source}: {problems(error)}") from None


def parse_mapping(text: str, source: str) -> dict[str, Any]:
    """A mapping from YAML or JSON text, without its `x-` keys (anchors). Raises UsageError in one line."""
    try:
        tree = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        raise UsageError(f"{source}{f', line {mark.line + 1}' if mark else ''}: not valid YAML or JSON") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{source}: a mapping of keys to values is wanted")
    return {key: value for key, value in tree.items() if not str(key).startswith("x-")}


def problems(error: ValidationError) -> str:
    """Every complaint of pydantic in one line: `rows.0.seconds: field required`."""
    told = []
    for problem in error.errors():
        where = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        told.append(f"{where}: {message}" if where else message)
    return "; ".join(told)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if path.suffix in SUFFIXES or path.exists():
        return [path]
    return []


@functools.cache
def _own() -> tuple[SpeedTable, ...]:
    folder = resources.files(__package__).joinpath("evidence")
    files = sorted((item for item in folder.iterdir() if item.name.endswith(SUFFIXES)), key=lambda item: item.name)
    return tuple(parse_table(item.read_text(encoding="utf-8"), item.name) for item in files)
