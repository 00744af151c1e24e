"""What recipes and flags are called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from halfbyte.recipe import list_presets
from halfbyte.recipe.schema import Recipe

GRID_NAMES = {"int4_sym": "symmetric int4", "int4_asym": "asymmetric int4", "nvfp4": "NVFP4"}


def title(recipe: Recipe) -> str:
    """A recipe in a few words: `GPTQ, symmetric int4, group 64, gptq format`."""
    grid = "" if recipe.method == "nvfp4" else f"{GRID_NAMES[str(recipe.grid)]}, "
    group = "one group a row" if recipe.group_size == -1 else f"group {recipe.group_size}"
    return f"{recipe.method.upper()}, {grid}{group}, {recipe.format} format"


def variant_of(recipe: Recipe) -> str | None:
    """What the recipe's format will declare within itself, as platforms' data and the serve command name it."""
    if recipe.format == "modelopt":
        return "NVFP4" if recipe.activations == "fp4" else "W4A16_NVFP4"
    if recipe.format == "compressed-tensors":
        return "nvfp4-pack-quantized" if recipe.grid == "nvfp4" else "pack-quantized"
    return None


def flag_words(flags: Mapping[str, str | None]) -> str:
    """Flags as they are typed."""
    return " ".join(f"{flag} {value}" if value else flag for flag, value in flags.items())


def joined(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def spell(recipe: Recipe) -> list[str]:
    """The words of a command line that name a recipe: the nearest preset, and --set for what differs."""
    wanted = _flat(recipe.identity())
    found = []
    for name, _, preset in list_presets():
        has = _flat(preset.identity())
        found.append((name, {key: value for key, value in wanted.items() if has.get(key) != value}))
    name, changes = min(found, key=lambda entry: len(entry[1]))
    return ["-r", name, *(word for key, value in changes.items() for word in ("--set", f"{key}={_yaml(value)}"))]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
