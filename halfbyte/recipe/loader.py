"""From a preset's name or a YAML file, and `--set key=value` words, to a checked Recipe."""

from __future__ import annotations

import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from halfbyte.errors import UsageError
from halfbyte.recipe.schema import Recipe

SUFFIXES = (".yaml", ".yml")


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of that preset or YAML file, after `overrides` ("boundary.keep=blocks", "ignore+=model.norm").

    Overrides meet the keys as they were written, before defaults follow from the method, so that
    `method=awq` alone also moves the grid and the format. Raises UsageError in one readable line.
    """
    tree = _read(name_or_path)
    for override in overrides:
        _apply(tree, override)
    return recipe_from_mapping(tree, name_or_path)


def recipe_from_mapping(tree: Mapping[str, Any], source: str) -> Recipe:
    """The recipe that a plain mapping spells; `source` names it in the UsageError that a wrong key raises."""
    if not isinstance(tree, Mapping):
        raise UsageError(f"{source}: a recipe is a mapping of keys to values, such as `method: gptq`")
    _check_keys(Recipe, tree, source)
    try:
        return Recipe.model_validate(dict(tree))
    except ValidationError as error:
        raise UsageError(f"{source}: {_one_line(error)}") from None


def read_tree(name_or_path: str) -> dict[str, Any]:
    """The keys of that preset or YAML file as they were written, for a caller that adds its own."""
    return _read(name_or_path)


def check_keys(tree: Mapping[Any, Any], source: str) -> None:
    """Raise UsageError, with the nearest known one, for a key that no recipe has."""
    _check_keys(Recipe, tree, source)


def list_presets() -> list[tuple[str, str, Recipe]]:
    """(name, description, recipe) of every preset, in the order of presets.yaml."""
    recipes = {name: recipe_from_mapping(tree, name) for name, tree in _presets().items()}
    return [(name, recipe.description, recipe) for name, recipe in recipes.items()]


@functools.cache
def _presets() -> dict[str, dict[str, Any]]:
    text = resources.files("halfbyte.recipe").joinpath("presets.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def _read(name_or_path: str) -> dict[str, Any]:
    presets = _presets()
    by_folded_name = {name.casefold(): name for name in presets}
    if name_or_path.casefold() in by_folded_name:
        return _deep_copy(presets[by_folded_name[name_or_path.casefold()]])
    path = Path(name_or_path)
    if path.is_file():
        return _read_file(path)
    if path.suffix in SUFFIXES or "/" in name_or_path:
        raise UsageError(f"recipe file {name_or_path} does not exist")
    hint = _did_you_mean(name_or_path, presets) or f": use {', '.join(presets)}, or a YAML file"
    raise UsageError(f"there is no recipe {name_or_path!r}{hint}")


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises UsageError in one line, with the place of a mistake."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "not text in UTF-8"
        raise UsageError(f"{path}{where}: not valid YAML ({what})") from None


def _read_file(path: Path) -> dict[str, Any]:
    tree = read_yaml(path)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys to values, such as `method: gptq`")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    append = key.endswith("+")
    path = key.rstrip("+").strip().split(".")
    if not equals or not all(path):
        raise UsageError(f"--set {override}: write key=value, such as group_size=64 or ignore+=re:.*down_proj")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--set {override}: {text!r} is not a YAML value; quote it") from None
    annotation = _annotation(path, f"--set {override}")
    here = tree
    for part in path[:-1]:
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            raise UsageError(f"--set {override}: {part} has no keys of its own in this recipe")
    is_list = typing.get_origin(annotation) is tuple
    if is_list and not isinstance(value, list):
        value = [] if value is None else [value]
    if append:
        if not is_list:
            raise UsageError(f"--set {override}: += adds to a list, and {'.'.join(path)} is not one; use =")
        value = list(_written_or_default(here, path)) + value
    here[path[-1]] = value


def _written_or_default(here: Mapping[str, Any], path: list[str]) -> Iterable[Any]:
    if path[-1] not in here:
        return Recipe.model_fields[path[-1]].default
    written = here[path[-1]]
    return written if isinstance(written, list) else [written]


def _annotation(path: list[str], source: str) -> Any:
    model: Any = Recipe
    for depth, part in enumerate(path):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            raise UsageError(f"{source}: {'.'.join(path[:depth])} is a value and has no key {part!r}")
        if part not in model.model_fields:
            raise UsageError(f"{source}: {_unknown_key(model, part, path[:depth])}")
        model = model.model_fields[part].annotation
    return model


def _check_keys(model: type[BaseModel], tree: Mapping[Any, Any], source: str, above: tuple[str, ...] = ()) -> None:
    for key, value in tree.items():
        if key not in model.model_fields:
            raise UsageError(f"{source}: {_unknown_key(model, str(key), above)}")
        inner = model.model_fields[key].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(value, Mapping):
            _check_keys(inner, value, source, (*above, key))


def _unknown_key(model: type[BaseModel], key: str, above: Iterable[str]) -> str:
    names = list(model.model_fields)
    full = ".".join((*above, key))
    return f"unknown recipe key {full!r}{_did_you_mean(key, names) or ': use one of ' + ', '.join(names)}"


def _did_you_mean(word: str, words: Iterable[str]) -> str:
    folded = {known.casefold(): known for known in words}
    close = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.5)
    return f": did you mean {folded[close[0]]!r}?" if close else ""


def _one_line(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
        given = problem.get("input")
        said = f" (it is {given!r})" if isinstance(given, (str, int, float)) else ""
        lines.append(f"{where}: {message}{said}" if where else message)
    return "; ".join(lines)


def _deep_copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _deep_copy(value) for key, value in tree.items()}
    return [_deep_copy(value) for value in tree] if isinstance(tree, list) else tree


def spell_type(annotation: Any) -> str:
    """An annotation in a reader's words: `gptq | awq`, `integer`, `list of names`."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(str(choice) for choice in inner)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(spell_type(part) for part in inner if part is not type(None))
    if origin is tuple:
        return "list of names"
    return {int: "integer", float: "number", bool: "true | false", str: "text"}.get(annotation, str(annotation))
