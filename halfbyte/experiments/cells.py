"""What a matrix's cells are for one checkpoint: schemes, bytes, notices, and which of their work is the same.

Two cells have the same bytes when every linear gets the same scheme from the same options in the same format, however
their recipes are spelled. Within a block, the linears that input scales tie together (v with o, up with down) are one
part; a part's key is all that its result depends on, so cells whose parts have one key share that part's solution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.engine.parts import parts_of
from halfbyte.errors import HalfbyteError
from halfbyte.experiments.matrix import Matrix, MatrixCell
from halfbyte.models import Checkpoint, Family
from halfbyte.plan import inventory
from halfbyte.plan.decision import hindrance, title
from halfbyte.plan.layers import LinearPlan, group_notices, quantized
from halfbyte.plan.words import joined
from halfbyte.platforms import Platform
from halfbyte.recipe import Recipe
from halfbyte.types import NVFP4_BLOCK, Scheme

HEAD = -1
"""The `block` of lm_head."""
PartKey = tuple[Any, ...]


@dataclass
class Cell:
    """One cell and how far it is. `reason`: why it failed; `same_as`: the cell with the same bytes that is made.

    recipe, plans, schemes   what becomes of every linear; absent where the cell is impossible
    facts                    what is known before a weight is read (see `describe`)
    """

    name: str
    recipe: Recipe | None = None
    plans: list[LinearPlan] = field(default_factory=list)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    reason: str = ""
    stage: str = ""
    same_as: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def fail(self, stage: str, error: Exception | str) -> None:
        """Set the cell aside; the first reason stays."""
        if not self.reason:
            self.stage, self.reason = stage, one_line(error)


def one_line(error: Exception | str) -> str:
    """An error as a cell's reason; one that halfbyte did not foresee is named."""
    words = " ".join(str(error).split())
    known = isinstance(error, (HalfbyteError, str))
    return words if known and words else f"{type(error).__name__}: {words}".rstrip(": ")


def resolve_cells(matrix: Matrix, checkpoint: Checkpoint, platforms: Sequence[Platform]) -> list[Cell]:
    """Every cell of the matrix on this checkpoint; an impossible one has its `reason`."""
    return [_resolve(cell, checkpoint, platforms) for cell in matrix.cells]


def _resolve(given: MatrixCell, checkpoint: Checkpoint, platforms: Sequence[Platform]) -> Cell:
    cell = Cell(given.name, given.recipe)
    if given.recipe is None:
        cell.fail("recipe", given.error)
        return cell
    try:
        linears = inventory.footprints(given.recipe, checkpoint)
    except HalfbyteError as error:
        cell.fail("recipe", error)
        return cell
    cell.plans = [linear.plan for linear in linears]
    cell.schemes = quantized(cell.plans)
    cell.facts = describe(given.recipe, linears, checkpoint)
    cell.notices = [*group_notices(given.recipe, cell.plans), *_format_notices(given.recipe, cell.schemes)]
    hindrances = {platform.name: hindrance(given.recipe, platform) for platform in platforms}
    cell.facts["platforms"] = hindrances
    cell.notices += [f"not portable: {reason}" for reason in hindrances.values() if reason]
    if not cell.schemes:
        cell.fail("recipe", "the recipe leaves every linear in BF16: nothing to quantize")
    return cell


def describe(recipe: Recipe, linears: Sequence[inventory.Footprint], checkpoint: Checkpoint) -> dict[str, Any]:
    """Title, group sizes in use, exemptions by reason, bytes and bits a weight, from headers alone."""
    sizes = inventory.totals(linears, checkpoint)
    used = {p.scheme.group_size for p in (linear.plan for linear in linears) if p.scheme}
    return {
        "title": title(recipe),
        "groups": sorted(used, reverse=True),
        "exemptions": [
            {key: row[key] for key in ("reason", "linears", "bytes_added")} for row in inventory.exemptions(linears)
        ],
        "bytes": sizes["after"],
        "bytes_bf16": sizes["before"],
        "bits_per_weight": sizes["bits_per_quantized_weight"],
        "bits_per_linear_weight": sizes["bits_per_linear_weight"],
    }


def _format_notices(recipe: Recipe, schemes: dict[str, Scheme]) -> list[str]:
    shared = {s.group_size for s in schemes.values() if s.grid == "nvfp4" and s.group_size > NVFP4_BLOCK}
    if not shared:
        return []
    groups = joined([*map(str, sorted(shared))])
    return [f"NVFP4 stores a scale for every {NVFP4_BLOCK} weights: no bytes are saved by groups of {groups}"]


def solve_options(recipe: Recipe) -> tuple[Any, ...]:
    """What of a recipe decides the codes of a linear, beside its scheme and the statistics."""
    return (
        recipe.grid,
        recipe.rounding,
        recipe.scaling,
        recipe.effort,
        recipe.damp,
        recipe.act_order,
        recipe.activations,
        recipe.propagate,
    )


def part_keys(cell: Cell, family: Family, data: str) -> dict[int, list[PartKey]]:
    """Every part that the cell quantizes, by block: (data, options, block, kinds, schemes of its linears).

    data    the calibration set's SHA-256
    """
    assert cell.recipe is not None
    options = solve_options(cell.recipe)
    found: dict[int, list[PartKey]] = {}
    for block in range(family.num_blocks):
        for kinds in parts_of(family, cell.recipe, block):
            schemes = tuple(cell.schemes.get(name) for name in part_names(family, block, kinds))
            if any(schemes):
                found.setdefault(block, []).append((data, options, block, kinds, schemes))
    head = cell.schemes.get(family.lm_head)
    if head is not None:
        found[HEAD] = [(data, options, HEAD, ("lm_head",), (head,))]
    return found


def part_names(family: Family, block: int, kinds: Sequence[str]) -> list[str]:
    """Full names of a part's linears."""
    if block == HEAD:
        return [family.lm_head]
    held = set(kinds)
    return [f"{family.block(block)}.{name}" for g in family.groups_of(block) if g.key in held for name in g.names]


def block_content(cell: Cell, parts: Sequence[PartKey]) -> tuple[Any, ...]:
    """What decides the bytes of a block's file: the format, and its parts."""
    assert cell.recipe is not None
    return (cell.recipe.format, cell.recipe.activations, tuple(parts))


def content_key(cell: Cell, data: str) -> tuple[Any, ...]:
    """What decides a cell's bytes for one checkpoint."""
    assert cell.recipe is not None
    schemes = tuple(sorted((name, s.grid, s.group_size) for name, s in cell.schemes.items()))
    return (cell.recipe.format, cell.recipe.tune, solve_options(cell.recipe), schemes, data)
