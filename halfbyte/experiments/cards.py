"""Model cards: what a card takes from a directory of results, and the card of every judged cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.artifact import model_card
from halfbyte.errors import HalfbyteError
from halfbyte.experiments.cells import Cell
from halfbyte.files import write_text
from halfbyte.models.checkpoint import read_json
from halfbyte.plan import variant_of
from halfbyte.platforms import Platform, list_platforms, load_platform
from halfbyte.recipe import Recipe
from halfbyte.report.sources import tells_of
from halfbyte.serving import serve_command

MEASURED = ("tasks", "long_context", "bench", "stability")
"""Results that a run may have besides fidelity, by the names of their files."""


def write_cards(
    place: Path,
    rows: Sequence[Mapping[str, Any]],
    cells: Sequence[Cell],
    manifests: Mapping[str, Mapping[str, Any]],
    platforms: Sequence[Platform],
    benches: Mapping[str, Mapping[str, Any]],
) -> None:
    """README.md in each judged cell's directory (`rows`: those of sweep.json); commands for where it can be served.
    `benches`: what was benchmarked, by cell."""
    recipes = {cell.name: cell.recipe for cell in cells}
    for row in rows:
        recipe = recipes[row["name"]]
        if row["status"] != "judged" or recipe is None:
            continue
        directory = place / row["path"]
        lines = {p.name: _command(directory, recipe, p) for p in platforms if not row["platforms"][p.name]}
        bench = benches.get(row["name"]) or {}
        speed = bench if bench.get("points") else None
        card = model_card(manifests[row["name"]], row["eval"], None, row["gates"], lines, bench=speed)
        write_text(directory / "README.md", card)


def card_results(place: Path | None, work: str) -> dict[str, Any]:
    """The results in a directory, by the names that `model_card` gives them; what is not there, or tells of another
    work, is left out."""
    names = {"evaluation": "eval"} | {n: n for n in ("served", "gates", *MEASURED)}
    files = {name: place / f"{file}.json" for name, file in names.items()} if place is not None else {}
    found = {name: read_json(file) for name, file in files.items() if file.is_file()}
    return {name: result for name, result in found.items() if tells_of(result, work)}


def commands_here(directory: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Serve commands that name the artifact as `.`, for every platform that can serve it."""
    recipe, found = Recipe.model_validate(manifest["recipe"]), {}
    for name in list_platforms():
        with suppress(HalfbyteError):
            found[name] = _command(directory, recipe, load_platform(name))
    return found


def _command(directory: Path, recipe: Recipe, platform: Platform) -> str:
    command = serve_command(directory, recipe.format, platform, variant=variant_of(recipe))
    return replace(command, argv=[*command.argv[:2], ".", *command.argv[3:]]).shell()
