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
from halfbyte.types import Scheme

Wanted = tuple[Recipe, dict[str, Scheme]]
"""A recipe, and the full names of the linears that it quantizes with their schemes."""


@dataclass(frozen=True)
class Part:
    """All that solving some linear groups of a block takes, for some recipes; it can be sent.

    wanted    recipes, each with its linears among these
    tensors   by name relative to the block: the groups' weights and all that are no linear's
    stats     by group kind
    factors   what recipes share, filled while solving (see solve_block)
    """

    family: Family
    block: int
    kinds: tuple[str, ...]
    wanted: Sequence[Wanted]
    tensors: dict[str, torch.Tensor]
    stats: dict[str, Stats]
    factors: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"block {self.block} ({', '.join(self.kinds)})"

    def to(self, device: str) -> Part:
        """The same on `device`."""
        stats = {kind: _stats_on(s, device) for kind, s in self.stats.items()}
        return replace(self, tensors={n: t.to(device) for n, t in self.tensors.items()}, stats=stats)


def divide(whole: Part) -> list[Part]:
    """The smallest parts that none of the recipes ties together."""
    kinds = [group.kind for group in whole.family.groups]
    tied = [part for recipe, _ in whole.wanted for part in parts_of(whole.family, recipe)]
    return [part for part in (_only(whole, kinds) for kinds in merged(kinds, tied)) if any(s for _, s in part.wanted)]


def _only(whole: Part, kinds: tuple[str, ...]) -> Part:
    """The part of `whole` with these kinds of groups."""
    family, prefix = whole.family, whole.family.block(whole.block) + "."
    mine = {name for group in family.groups if group.kind in kinds for name in group.names}
    others = {name for group in family.groups for name in group.names} - mine
    wanted = [(r, {n: s for n, s in schemes.items() if n.removeprefix(prefix) in mine}) for r, schemes in whole.wanted]
    tensors = {n: t for n, t in whole.tensors.items() if n.rpartition(".")[0] not in others}
    stats = {kind: s for kind, s in whole.stats.items() if kind in kinds}
    return replace(whole, kinds=kinds, wanted=wanted, tensors=tensors, stats=stats, factors={})


def parts_of(family: Family, recipe: Recipe) -> list[tuple[str, ...]]:
    """The kinds of a block's linear groups in sets that are solved apart: those that input scales tie are together,
    and all of them where the statistics come from behind the quantized blocks."""
    kinds = [group.kind for group in family.groups]
    if recipe.propagate:
        return [tuple(kinds)]
    owner = {name: group.kind for group in family.groups for name in group.names}
    folds = family.architecture.folds if recipe.scaling == "awq" else ()
    return merged(kinds, [(fold.kind, owner[fold.linear]) for fold in folds if fold.linear])


def merged(kinds: Sequence[str], tied: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """`kinds` in the smallest sets that hold each of `tied` together; all in the order of `kinds`."""
    parts = [{kind} for kind in kinds]
    for tie in tied:
        touched = [part for part in parts if part & set(tie)]
        parts = [part for part in parts if part not in touched] + [set[str]().union(*touched)]
    return sorted((tuple(sorted(part, key=kinds.index)) for part in parts), key=lambda part: kinds.index(part[0]))


def together(parts: Iterable[BlockResult]) -> BlockResult:
    """Parts of one block as the block's result."""
    whole = BlockResult()
    for part in parts:
        whole.linears |= part.linears
        whole.tensors |= part.tensors
        whole.notices += part.notices
        whole.seconds += part.seconds
    return whole


def _stats_on(stats: Stats, device: str) -> Stats:
    gram = None if stats.gram_II is None else stats.gram_II.to(device)
    return replace(stats, second_moment_I=stats.second_moment_I.to(device), gram_II=gram)
