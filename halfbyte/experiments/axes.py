"""Axes that multiply: every combination of their values, named by labels."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.platforms.base import merged
from halfbyte.recipe import Recipe
from halfbyte.recipe.loader import check_keys

EXTENDS = "extends"


def expand_axes(axes: Any, source: str) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """(recipe keys, label on each axis) of every combination, the last axis running fastest; nothing without axes.

    An axis is a recipe key (`group_size`, `boundary.keep`, or `extends`) with a list of values or a mapping of labels
    to values; under any other name, a mapping of labels to recipe keys. Raises UsageError for anything else.
    """
    if not isinstance(axes, Mapping):
        raise UsageError(f"{source}: a mapping of recipe keys to lists, such as `group_size: [64, 128]`")
    if not axes:
        return
    values = [_values(str(axis), choices, source) for axis, choices in axes.items()]
    for combination in itertools.product(*values):
        keys: dict[str, Any] = {}
        for _, more in combination:
            keys = merged(keys, more)
        yield keys, {str(axis): label for axis, (label, _) in zip(axes, combination)}


def _values(axis: str, choices: Any, source: str) -> list[tuple[str, dict[str, Any]]]:
    """(label, recipe keys) of every value of one axis."""
    is_key = axis == EXTENDS or axis.split(".")[0] in Recipe.model_fields
    if not is_key and not isinstance(choices, Mapping):
        check_keys(nested(axis, None), source)
    if not isinstance(choices, (list, Mapping)) or not choices:
        raise UsageError(f"{source}: {axis} needs a list of values, such as `group_size: [64, 128]`")
    named = choices if isinstance(choices, Mapping) else {label(axis, value): value for value in choices}
    if len(named) < len(choices):
        raise UsageError(f"{source}: {axis} has a value twice")
    found = []
    for name, value in named.items():
        keys = nested(axis, value) if is_key else value
        if not isinstance(keys, Mapping):
            raise UsageError(f"{source}: {axis}: {name} needs recipe keys, such as {{group_size: 64}}")
        check_keys({k: v for k, v in keys.items() if k != EXTENDS}, source)
        found.append((re.sub(r"[^\w.+-]+", "_", str(name)).strip("_") or "_", dict(keys)))
    return found


def label(axis: str, value: Any) -> str:
    """A value's name within a cell's: g64, blocks, act_order, no-act_order, damp0.01."""
    leaf = axis.rsplit(".", 1)[-1]
    if isinstance(value, Mapping):
        return "-".join(label(str(key), inner) for key, inner in value.items()) or leaf
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value)) or f"no-{leaf}"
    if value is None or isinstance(value, bool):
        return leaf if value else f"no-{leaf}"
    if isinstance(value, (int, float)):
        short = "g" if leaf == "group_size" else leaf
        return "row" if leaf == "group_size" and value == -1 else f"{short}{value:g}"
    return Path(str(value)).stem if axis == EXTENDS else str(value)


def nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for "a.b"."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return value
