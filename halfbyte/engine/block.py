"""One block, one recipe: scale what may be scaled, fold it into what precedes, quantize group by group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from halfbyte.algo import Options, Solved, Stats, find_scale, get_grid, solve_group
from halfbyte.errors import HalfbyteError
from halfbyte.models import Family, Fold
from halfbyte.recipe.schema import Recipe
from halfbyte.types import LinearGroup, Scheme


@dataclass
class BlockResult:
    """What a block became. Names are full.

    linears    each quantized linear
    tensors    other tensors that changed (norms and biases that took up a scale)
    notices    what a user should know (damping raised, ...)
    seconds    what solving took
    experts    by the full name of a module of experts: {"tokens": calibration tokens of each, "starved": those that few
               reached}
    """

    linears: dict[str, Solved] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    seconds: float = 0.0
    experts: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def add(self, other: BlockResult) -> None:
        """Take in another part of the same block."""
        self.linears |= other.linears
        self.tensors |= other.tensors
        self.notices += other.notices
        self.seconds += other.seconds
        self.experts |= other.experts


def options_of(recipe: Recipe) -> Options:
    """The recipe as the algorithms see it."""
    assert recipe.grid is not None and recipe.rounding is not None and recipe.damp is not None
    return Options(recipe.grid, recipe.rounding, recipe.effort, recipe.damp, recipe.act_order)


def solve_block(
    recipe: Recipe,
    family: Family,
    index: int,
    schemes: dict[str, Scheme],
    tensors: dict[str, torch.Tensor],
    stats: dict[str, Stats],
    factors: dict[tuple, Any],
    groups: Sequence[LinearGroup] | None = None,
) -> BlockResult:
    """Quantize block `index`, or those `groups` of it that input scales do not tie to the others.

    schemes   by full linear name; what is missing stays in BF16
    tensors   the block's tensors by name relative to the block, on the device that solves
    stats     by the groups' keys (missing: data-free)
    factors   a cache of the groups that recipes share: factors by group, damping and order, scales by group, grid,
              group size and effort
    Raises HalfbyteError where a weight or a calibration input is not finite.
    """
    prefix = family.block(index) + "."
    groups = family.groups_of(index) if groups is None else groups
    todo = [g for g in groups if prefix + g.names[0] in schemes]
    result = BlockResult()
    weights = {n: tensors[f"{n}.weight"] for g in todo for n in g.names}
    group_stats = {g.key: stats.get(g.key) or _no_stats(weights[g.names[0]]) for g in todo}
    for group in todo:
        _refuse_broken(prefix, group, weights, group_stats[group.key])
    scaled: set[str] = set()
    if recipe.scaling == "awq":
        folds = family.folds_of(index)
        scaled = _scale(recipe, family, folds, prefix, schemes, todo, tensors, weights, group_stats, factors, result)
    options = options_of(recipe)
    for group in todo:
        scheme = schemes[prefix + group.names[0]]
        here = group_stats[group.key]
        key = (group.key, options.damp, options.act_order)
        shared = None if group.key in scaled else factors.get(key)
        solved, factor = solve_group([weights[n] for n in group.names], here, scheme.group_size, options, shared)
        if factor is not None and group.key not in scaled:
            factors[key] = factor
        if factor is not None and factor.damp > options.damp:
            result.notices.append(f"{prefix}{_called(group)}: damping raised from {options.damp:g} to {factor.damp:g}")
        for name, one in zip(group.names, solved):
            result.linears[prefix + name] = _with_input_scale(recipe, one, here)
    return result


def _no_stats(weight_OI: torch.Tensor) -> Stats:
    return Stats.uniform(weight_OI.shape[1], weight_OI.device)


def _called(group: LinearGroup) -> str:
    """How notices call a group: as vLLM does, but for an expert, which has no module of its own there."""
    return group.fused if group.expert is None else f"{group.fused}.{group.expert}.{group.kind}"


def _refuse_broken(prefix: str, group: LinearGroup, weights: dict[str, torch.Tensor], stats: Stats) -> None:
    for name in group.names:
        if not bool(weights[name].isfinite().all()):
            raise HalfbyteError(f"{prefix}{name}.weight holds numbers that are not finite: fetch the model again")
    if not (math.isfinite(stats.absmax) and bool(stats.second_moment_I.isfinite().all())):
        raise HalfbyteError(f"{prefix}{_called(group)}: its calibration inputs are not finite: is the model broken?")


def _with_input_scale(recipe: Recipe, solved: Solved, stats: Stats) -> Solved:
    if recipe.activations != "fp4":
        return solved
    return replace(solved, q=replace(solved.q, input_scale=max(stats.absmax, 1e-6) / (6 * 448)))


def _scale(
    recipe: Recipe,
    family: Family,
    folds: Sequence[Fold],
    prefix: str,
    schemes: dict[str, Scheme],
    todo: list[LinearGroup],
    tensors: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    stats: dict[str, Stats],
    shared: dict[tuple, Any],
    result: BlockResult,
) -> set[str]:
    """Find and fold input scales; changes `weights` and `stats` in place. Returns the keys of what was scaled.

    All scales are found before any is folded, so that they are those of the block as it was: `shared` keeps them.
    """
    groups = {g.key: g for g in todo}
    grid = get_grid(options_of(recipe).grid)
    scaled = set()
    found: dict[str, torch.Tensor] = {}
    for fold in folds:
        group = groups.get(fold.kind)
        if group is None or (fold.linear and fold.linear not in weights):
            continue
        size = schemes[prefix + group.names[0]].group_size
        key = ("scale", fold.kind, recipe.grid, size, recipe.effort)
        if key not in shared:
            originals = [weights[n] for n in group.names]
            shared[key] = find_scale(originals, stats[fold.kind], grid, size, recipe.effort, family.repeat_of(fold))
        s = shared[key]
        if bool((s != 1).any()):
            found[fold.kind] = s
    for fold in folds:
        if fold.kind in found:
            s = _absorb(fold, family, prefix, found[fold.kind], tensors, weights, result)
            for name in groups[fold.kind].names:
                weights[name] = weights[name] * s
            stats[fold.kind] = replace(stats[fold.kind].scaled(s), absmax=stats[fold.kind].absmax / float(s.min()))
            scaled.add(fold.kind)
    return scaled


def _absorb(
    fold: Fold,
    family: Family,
    prefix: str,
    s: torch.Tensor,
    tensors: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    result: BlockResult,
) -> torch.Tensor:
    """Divide what precedes by s; returns the scale that was really absorbed (a norm's weight is rounded to BF16,
    and the linears take up the rounding; a weight that would round to nothing stays as it is)."""
    if fold.norm:
        offset = family.architecture.norm_offset
        old = tensors[f"{fold.norm}.weight"]
        new = ((old.float() + offset) / s - offset).to(old.dtype)
        absorbed, usable = norm_scale(old, new, offset)
        result.tensors[f"{prefix}{fold.norm}.weight"] = torch.where(usable, new, old)
        return absorbed
    weight = weights[fold.linear]
    rows = family.rows_of(fold, len(weight))
    per_row = family.rows_from(fold, s)
    weights[fold.linear] = weight.float().clone()
    weights[fold.linear][rows] /= per_row[:, None]
    bias = f"{fold.linear}.bias"
    if bias in tensors:
        old = result.tensors.get(prefix + bias, tensors[bias])
        new = old.float().clone()
        new[rows] /= per_row
        result.tensors[prefix + bias] = new.to(old.dtype)
    return s


def norm_scale(old: torch.Tensor, new: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(by what a norm's weight was divided, float32; where it can have been). One where either weight is zero.

    offset    what the norm adds to its weight
    """
    before, after = old.float() + offset, new.float() + offset
    usable = (after != 0) & (before != 0)
    one = torch.ones_like(after)
    return torch.where(usable, before / torch.where(usable, after, one), one), usable
