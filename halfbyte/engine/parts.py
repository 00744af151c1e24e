"""A block's linear groups in parts that can be solved apart from each other, with the very results of solving all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from halfbyte.algo import Stats
from halfbyte.engine.block import BlockResult
from halfbyte.models import Family
from halfbyte.recipe.schema import Recipe
from halfbyte.types import LinearGroup, Scheme

Wanted = tuple[Recipe, dict[str, Scheme]]
"""A recipe, and the full names of the linears that it quantizes with their schemes."""


@dataclass(frozen=True)
class Part:
    """All that solving some linear groups of a block takes, for some recipes; it can be sent.

    wanted    recipes, each with its linears among these
    tensors   by name relative to the block: the groups' weights and all that are no linear's
    stats     by the groups' keys
    factors   what recipes share, filled while solving (see solve_block)
    """

    family: Family
    block: int
    groups: tuple[LinearGroup, ...]
    wanted: Sequence[Wanted]
    tensors: dict[str, torch.Tensor]
    stats: dict[str, Stats]
    factors: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"block {self.block} ({', '.join(group.key for group in self.groups)})"

    def to(self, device: str) -> Part:
        """The same on `device`."""
        stats = {key: _stats_on(s, device) for key, s in self.stats.items()}
        return replace(self, tensors={n: t.to(device) for n, t in self.tensors.items()}, stats=stats)


def divide(whole: Part) -> list[Part]:
    """The smallest parts that none of the recipes ties together; an expert stays one."""
    keys = [group.key for group in whole.groups]
    if any(group.expert is not None for group in whole.groups):
        sets = [tuple(keys)]
    else:
        sets = merged(keys, [part for r, _ in whole.wanted for part in parts_of(whole.family, r, whole.block)])
    return [part for part in (_only(whole, some) for some in sets) if any(schemes for _, schemes in part.wanted)]


def _only(whole: Part, keys: tuple[str, ...]) -> Part:
    """The part of `whole` with these groups, and what belongs to them."""
    family, prefix = whole.family, whole.family.block(whole.block) + "."
    groups = tuple(group for group in whole.groups if group.key in keys)
    mine = {name for group in groups for name in group.names}
    others = {name for group in family.groups_of(whole.block) for name in group.names} - mine
    wanted = [(r, {n: s for n, s in schemes.items() if n.removeprefix(prefix) in mine}) for r, schemes in whole.wanted]
    tensors = {n: t for n, t in whole.tensors.items() if n.rpartition(".")[0] not in others}
    stats = {key: s for key, s in whole.stats.items() if key in keys}
    return replace(whole, groups=groups, wanted=wanted, tensors=tensors, stats=stats, factors={})


def parts_of(family: Family, recipe: Recipe, block: int = 0) -> list[tuple[str, ...]]:
    """The keys of a block's linear groups in sets that are solved apart: those that input scales tie are together, so
    are all experts, and all of them where the statistics come from behind the quantized blocks."""
    groups = family.groups_of(block)
    keys = [group.key for group in groups]
    if recipe.propagate:
        return [tuple(keys)]
    modules: dict[str, list[str]] = {}
    for group in groups:
        modules.setdefault(group.fused, []).append(group.key)
    owner = {name: group.key for group in groups for name in group.names}
    folds = family.folds_of(block) if recipe.scaling == "awq" else ()
    return merged(keys, [*map(tuple, modules.values()), *((f.kind, owner[f.linear]) for f in folds if f.linear)])


def merged(keys: Sequence[str], tied: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """`keys` in the smallest sets that hold each of `tied` together; all in the order of `keys`."""
    order = {key: place for place, key in enumerate(keys)}
    parts = [{key} for key in keys]
    for tie in tied:
        touched = [part for part in parts if part & set(tie)]
        if len(touched) > 1:
            parts = [part for part in parts if part not in touched] + [set[str]().union(*touched)]
    ordered = (tuple(sorted(part, key=order.__getitem__)) for part in parts)
    return sorted(ordered, key=lambda part: order[part[0]])


def together(parts: Iterable[BlockResult]) -> BlockResult:
    """Parts of one block as the block's result."""
    whole = BlockResult()
    for part in parts:
        whole.add(part)
    return whole


def _stats_on(stats: Stats, device: str) -> Stats:
    gram = None if stats.gram_II is None else stats.gram_II.to(device)
    return replace(stats, second_moment_I=stats.second_moment_I.to(device), gram_II=gram)
