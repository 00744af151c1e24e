"""The experiment matrix: named cells, a recipe each, from YAML with `extends`, axes that multiply, and `exclude`.

A matrix is read in two steps. Its form (keys, names, what extends what) must be right as a whole: a mistake there is a
UsageError in one line. A cell whose keys are right but whose recipe is impossible (an AWQ grid in a modelopt file) is
kept with its reason, so that one such combination does not stop the others.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from halfbyte.errors import UsageError
from halfbyte.experiments.axes import expand_axes, nested
from halfbyte.platforms.base import merged
from halfbyte.recipe import Recipe
from halfbyte.recipe.loader import check_keys, read_tree, read_yaml, recipe_from_mapping

KEYS = ("description", "extends", "defaults", "cells", "axes", "exclude")
CELL_KEYS = ("extends", "axes")
"""What a cell may say beside the keys of a recipe."""
SUFFIXES = (".yaml", ".yml")
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
"""A cell's name is its directory's."""


@dataclass(frozen=True)
class MatrixCell:
    """One cell. `keys`: the recipe as written; `labels`: its place on each axis; `recipe` None: `error` says why."""

    name: str
    keys: dict[str, Any]
    labels: dict[str, str] = field(default_factory=dict)
    recipe: Recipe | None = None
    error: str = ""


@dataclass(frozen=True)
class Matrix:
    """Cells in order. `name`: of a ready matrix or the file's stem."""

    name: str
    description: str
    cells: tuple[MatrixCell, ...]

    def only(self, patterns: Sequence[str]) -> Matrix:
        """The cells whose names match one of `patterns` (shell patterns); all of them where there is none.

        Raises UsageError for a pattern that matches no cell.
        """
        names = [cell.name for cell in self.cells]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                told = hint(pattern, names) or f": use {', '.join(names)}"
                raise UsageError(f"matrix {self.name} has no cell {pattern!r}{told}")
        kept = [c for c in self.cells if not patterns or any(fnmatch.fnmatchcase(c.name, p) for p in patterns)]
        return Matrix(self.name, self.description, tuple(kept))


def load_matrix(source: str | Path | Mapping[str, Any] | Matrix) -> Matrix:
    """The matrix of that name, YAML file or mapping. Raises UsageError in one line that names the place."""
    if isinstance(source, Matrix):
        return source
    if isinstance(source, Mapping):
        return _matrix("matrix", source, "matrix")
    return _matrix(*_read(str(source)))


def list_matrices() -> dict[str, str]:
    """Name and description of every ready matrix."""
    return {name: tree["description"] for name, tree in _ready().items()}


@functools.cache
def _ready() -> dict[str, dict[str, Any]]:
    text = resources.files("halfbyte.experiments").joinpath("matrices.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def _read(source: str, beside: Path | None = None) -> tuple[str, Mapping[str, Any], str]:
    """(name, content, place) of a ready matrix or a file; a relative path is also tried `beside` the file that names
    it."""
    by_folded_name = {name.casefold(): name for name in _ready()}
    if source.casefold() in by_folded_name:
        name = by_folded_name[source.casefold()]
        return name, _ready()[name], name
    path = next((p for p in (Path(source), (beside or Path()) / source) if p.is_file()), None)
    if path is None:
        if Path(source).suffix in SUFFIXES or "/" in source:
            raise UsageError(f"matrix file {source} does not exist")
        told = hint(source, _ready()) or f": use {', '.join(_ready())}, or a YAML file"
        raise UsageError(f"there is no matrix {source!r}{told}")
    return path.stem, read_yaml(path), str(path)


def _matrix(name: str, tree: Any, source: str) -> Matrix:
    cells = _cells(tree, source, (source,))
    if not cells:
        raise UsageError(f"{source}: no cell is left: give cells or axes, or exclude less")
    return Matrix(name, str(tree.get("description") or ""), tuple(cells.values()))


def _cells(tree: Any, source: str, above: tuple[str, ...]) -> dict[str, MatrixCell]:
    """The cells of one matrix, those it extends first; an own cell of the same name takes the other's place."""
    if not isinstance(tree, Mapping):
        raise UsageError(f"{source}: a matrix is a mapping with cells or axes, such as `cells: [A1, B1]`")
    _refuse_unknown(tree, KEYS, source)
    cells = _extended(tree, source, above)
    defaults = _keys(tree.get("defaults") or {}, f"{source}: defaults")
    if defaults:
        cells = {name: _cell(name, _over(c.keys, defaults), c.labels, source) for name, c in cells.items()}
    specs = _specs(tree.get("cells"), source)
    for name in specs:
        for found in _expand(name, specs, cells, defaults, source):
            cells[found.name] = found
    for keys, labels in expand_axes(tree.get("axes") or {}, f"{source}: axes"):
        name = "-".join(labels.values())
        if name in cells:
            raise UsageError(f"{source}: two cells are called {name!r}: name the values (axis: {{label: value}})")
        cells[name] = _cell(name, _resolve(keys, {}, cells, defaults, source, ()), labels, source)
    return _without(cells, tree.get("exclude") or [], source)


def _extended(tree: Mapping[str, Any], source: str, above: tuple[str, ...]) -> dict[str, MatrixCell]:
    named = tree.get("extends")
    if named is None:
        return {}
    _, other, place = _read(str(named), Path(source).parent)
    if place in above:
        raise UsageError(f"{source}: extends {named}, which extends this one")
    return _cells(other, place, (*above, place))


def _specs(cells: Any, source: str) -> dict[str, dict[str, Any]]:
    """Every cell's own words as a mapping: a bare name extends the preset (or file) of that name."""
    if cells is None:
        return {}
    if isinstance(cells, list):
        cells = {str(name) if isinstance(name, (str, int)) else "": None for name in cells}
    if not isinstance(cells, Mapping):
        raise UsageError(f"{source}: cells is a list of presets or a mapping of names, such as `cells: [A1, B1]`")
    specs = {}
    for key, spec in cells.items():
        name = str(key)
        if not NAME.fullmatch(name):
            raise UsageError(f"{source}: {name!r} is no name for a cell: use letters, digits and . _ + -")
        spec = {"extends": name} if spec is None else {"extends": spec} if isinstance(spec, str) else spec
        if not isinstance(spec, Mapping):
            raise UsageError(f"{source}: cell {name}: a mapping of recipe keys, or the name of what it extends")
        _keys({k: v for k, v in spec.items() if k not in CELL_KEYS}, f"{source}: cell {name}", CELL_KEYS)
        specs[name] = dict(spec)
    return specs


def _expand(
    name: str,
    specs: Mapping[str, dict[str, Any]],
    cells: Mapping[str, MatrixCell],
    defaults: dict[str, Any],
    source: str,
) -> Iterable[MatrixCell]:
    spec = {k: v for k, v in specs[name].items() if k != "axes"}
    axes = expand_axes(specs[name].get("axes") or {}, f"{source}: cell {name}: axes")
    if "axes" not in specs[name]:
        yield _cell(name, _resolve(spec, specs, cells, defaults, source, (name,)), {}, source)
    for keys, labels in axes:
        tree = _resolve(merged(spec, keys), specs, cells, defaults, source, (name,))
        yield _cell("-".join([name, *labels.values()]), tree, labels, source)


def _resolve(
    spec: Mapping[str, Any],
    specs: Mapping[str, dict[str, Any]],
    cells: Mapping[str, MatrixCell],
    defaults: dict[str, Any],
    source: str,
    above: tuple[str, ...],
) -> dict[str, Any]:
    """Recipe keys of a cell: what it extends (a cell here, a preset, a recipe file), then defaults, then its own."""
    own = {key: value for key, value in spec.items() if key not in CELL_KEYS}
    base = spec.get("extends")
    if base is None:
        return merged(defaults, own)
    base = str(base)
    if base in specs and base not in above:
        below = {k: v for k, v in specs[base].items() if k != "axes"}
        return _over(_resolve(below, specs, cells, defaults, source, (*above, base)), own)
    if base in above[:-1]:
        raise UsageError(f"{source}: cells extend each other in a circle: {' -> '.join([*above, base])}")
    if base in cells and base not in above:
        return _over(cells[base].keys, own)
    try:
        return _over(_over(read_tree(base), defaults), own)
    except UsageError as error:
        told = hint(base, specs)
        raise UsageError(
            f"{source}: {error if not told else f'extends {base!r}, which is nothing here{told}'}"
        ) from None


def _over(base: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` keys over those of a base, whose description then no longer fits."""
    return merged({k: v for k, v in base.items() if k != "description" or not own}, own)


def _cell(name: str, keys: dict[str, Any], labels: dict[str, str], source: str) -> MatrixCell:
    try:
        return MatrixCell(name, keys, labels, recipe_from_mapping(keys, name))
    except UsageError as error:
        check_keys(keys, f"{source}: cell {name}")
        return MatrixCell(name, keys, labels, None, str(error).removeprefix(f"{name}: "))


def _without(cells: dict[str, MatrixCell], exclude: Any, source: str) -> dict[str, MatrixCell]:
    """The cells that no entry of `exclude` matches: a name or shell pattern, or {key or axis: value or values}."""
    if not isinstance(exclude, list):
        raise UsageError(f"{source}: exclude is a list of names or of {{key: value}}")
    for entry in exclude:
        if isinstance(entry, Mapping):
            axes = {axis for cell in cells.values() for axis in cell.labels}
            for key in entry:
                if key not in axes:
                    check_keys(nested(str(key), None), f"{source}: exclude")
            gone = [n for n, cell in cells.items() if all(_matches(cell, str(k), v) for k, v in entry.items())]
        else:
            gone = fnmatch.filter(cells, str(entry))
        if not gone:
            raise UsageError(f"{source}: exclude: {entry!r} matches no cell{hint(str(entry), cells)}")
        cells = {name: cell for name, cell in cells.items() if name not in gone}
    return cells


def _matches(cell: MatrixCell, key: str, wanted: Any) -> bool:
    value: Any = cell.recipe.model_dump(mode="json") if cell.recipe else cell.keys
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    options = wanted if isinstance(wanted, list) else [wanted]
    if isinstance(value, Mapping):
        return cell.labels.get(key) in options or any(_within(option, value) for option in options)
    return cell.labels.get(key) in options or value in options


def _within(part: Any, whole: Mapping[str, Any]) -> bool:
    return isinstance(part, Mapping) and all(whole.get(key) == value for key, value in part.items())


def _keys(keys: Any, source: str, also: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(keys, Mapping):
        raise UsageError(f"{source}: a mapping of recipe keys to values, such as `group_size: 64`")
    for key in keys:
        if key not in Recipe.model_fields and (told := hint(str(key), also)):
            raise UsageError(f"{source}: unknown key {str(key)!r}{told}")
    check_keys(keys, source)
    return dict(keys)


def _refuse_unknown(tree: Mapping[Any, Any], known: Sequence[str], source: str) -> None:
    for key in tree:
        if key not in known:
            told = hint(str(key), known) or f": use one of {', '.join(known)}"
            raise UsageError(f"{source}: unknown matrix key {str(key)!r}{told}")


def hint(word: str, words: Iterable[str]) -> str:
    """`: did you mean 'x'?`, or nothing where no word is close."""
    folded = {known.casefold(): known for known in words}
    close = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.5)
    return f": did you mean {folded[close[0]]!r}?" if close else ""
