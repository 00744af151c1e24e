"""The model card of every judged cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.artifact import model_card
from halfbyte.experiments.cells import Cell
from halfbyte.files import write_text
from halfbyte.plan import variant_of
from halfbyte.platforms import Platform
from halfbyte.recipe import Recipe
from halfbyte.serving import serve_command


def write_cards(
    place: Path,
    rows: Sequence[Mapping[str, Any]],
    cells: Sequence[Cell],
    manifests: Mapping[str, Mapping[str, Any]],
    platforms: Sequence[Platform],
) -> None:
    """README.md in each judged cell's directory (`rows`: those of sweep.json); commands for where it can be served."""
    recipes = {cell.name: cell.recipe for cell in cells}
    for row in rows:
        recipe = recipes[row["name"]]
        if row["status"] != "judged" or recipe is None:
            continue
        directory = place / row["path"]
        lines = {p.name: _command(directory, recipe, p) for p in platforms if not row["platforms"][p.name]}
        write_text(directory / "README.md", model_card(manifests[row["name"]], row["eval"], None, row["gates"], lines))


def _command(directory: Path, recipe: Recipe, platform: Platform) -> str:
    command = serve_command(directory, recipe.format, platform, variant=variant_of(recipe))
    return replace(command, argv=[*command.argv[:2], ".", *command.argv[3:]]).shell()
