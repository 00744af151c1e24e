"""Which linear is quantized how: the recipe's layer policy applied to one model, in one place for every room.

vLLM fuses linears that read the same input, so a LinearGroup shares one fate: it is quantized whole, in one
group size, or stays in BF16 whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.models import Checkpoint, Family, family_of
from halfbyte.recipe.schema import GROUP_SIZES, Recipe
from halfbyte.types import LinearGroup, Scheme


@dataclass(frozen=True)
class LinearPlan:
    """One linear's fate. `scheme` None: it stays in BF16, and `reason` says why."""

    name: str
    block: int | None
    kind: str
    fused: str
    out_features: int
    in_features: int
    scheme: Scheme | None
    reason: str


def assign(recipe: Recipe, checkpoint: Checkpoint, family: Family | None = None) -> list[LinearPlan]:
    """Every linear of the model (blocks first, then lm_head where it has weights of its own), with its scheme.

    `family`: what a block looks like, where the caller knows more than `family_of` (plan.moe).

    Raises UsageError where a group size does not divide (and the recipe says `error`), where an `ignore` entry
    matches nothing or only a part of a fused group; HalfbyteError where a linear has no weight.
    """
    family = family or family_of(checkpoint.config)
    recipe = _one_size(recipe, checkpoint, family)
    ignored = _Ignore(recipe.ignore)
    plans = []
    for index in range(family.num_blocks):
        for group in family.groups:
            plans += _group(recipe, checkpoint, family, index, group, ignored)
    plans.append(_head(recipe, checkpoint, family, ignored))
    ignored.refuse_unused(family)
    return plans


def quantized(plans: list[LinearPlan]) -> dict[str, Scheme]:
    """The schemes of the linears that are quantized, by full name."""
    return {p.name: p.scheme for p in plans if p.scheme is not None}


def _one_size(recipe: Recipe, checkpoint: Checkpoint, family: Family) -> Recipe:
    """An awq file holds one group size: where a smaller one is allowed, the largest that divides every linear."""
    if recipe.format != "awq" or recipe.indivisible != "smaller":
        return recipe
    widths = {_shape(checkpoint, f"{family.block(0)}.{n}")[1] for g in family.groups for n in g.names}
    fitting = [g for g in (128, 64, 32) if g <= recipe.group_size and not any(w % g for w in widths)]
    return recipe.model_copy(update={"group_size": fitting[0]}) if fitting else recipe


class _Ignore:
    """The recipe's `ignore` entries: full module names (or a parent's), or `re:` patterns for re.fullmatch."""

    def __init__(self, entries: tuple[str, ...]):
        self.entries = entries
        self.used: set[str] = set()
        self.patterns: dict[str, re.Pattern[str]] = {}
        for entry in entries:
            if entry.startswith("re:"):
                try:
                    self.patterns[entry] = re.compile(entry[3:])
                except re.error as error:
                    raise UsageError(f"ignore: {entry!r} is no regular expression ({error})") from error

    def match(self, name: str) -> str | None:
        """The first entry that matches `name`, if any; every one that does counts as used."""
        hits = [entry for entry in self.entries if self._covers(entry, name)]
        self.used.update(hits)
        return hits[0] if hits else None

    def match_group(self, names: list[str], fused: str) -> str | None:
        """The entry that keeps a fused group. A pattern that finds some members keeps a part, even where it happens
        to find the fused name too (`.*v_proj` finds qkv_proj): that is refused."""
        hits = [self.match(name) for name in names]
        first = next((hit for hit in hits if hit), None)
        if all(hits):
            return first
        whole = self.match(fused)
        if whole and not any(self._covers(whole, name) for name in names):
            return whole
        if first is None:
            return None
        rest = ", ".join(name.rsplit(".", 1)[-1] for name, hit in zip(names, hits) if not hit)
        raise UsageError(f"ignore: {first!r} keeps a part of {fused}, which vLLM fuses: keep {rest} as well, or none")

    def _covers(self, entry: str, name: str) -> bool:
        pattern = self.patterns.get(entry)
        if pattern is not None:
            return pattern.fullmatch(name) is not None
        return name == entry or name.startswith(entry + ".")

    def refuse_unused(self, family: Family) -> None:
        known = {family.lm_head, family.embedding, family.embedding.rsplit(".", 1)[-1]}
        for entry in self.entries:
            if entry not in self.used and entry not in known:
                raise UsageError(f"ignore: {entry!r} matches no linear of this model: use full names or re:patterns")


def _group(
    recipe: Recipe, checkpoint: Checkpoint, family: Family, index: int, group: LinearGroup, ignored: _Ignore
) -> list[LinearPlan]:
    names = [f"{family.block(index)}.{n}" for n in group.names]
    fused = f"{family.block(index)}.{group.fused}"
    shapes = [_shape(checkpoint, n) for n in names]
    scheme, reason = _fate(recipe, family, index, group, names, fused, shapes[0][1], ignored)
    return [LinearPlan(n, index, group.kind, fused, o, i, scheme, reason) for n, (o, i) in zip(names, shapes)]


def _fate(
    recipe: Recipe,
    family: Family,
    index: int,
    group: LinearGroup,
    names: list[str],
    fused: str,
    width: int,
    ignored: _Ignore,
) -> tuple[Scheme | None, str]:
    entry = ignored.match_group(names, fused)
    if entry:
        return None, f"ignore: {entry}"
    edge = min(index, family.num_blocks - 1 - index) < recipe.boundary.blocks
    if edge and recipe.boundary.keep == "blocks":
        return None, "boundary block"
    if edge and recipe.boundary.keep == "projections" and group.kind in ("o", "down"):
        return None, "boundary projection"
    return _scheme(recipe, fused, width)


def _scheme(recipe: Recipe, name: str, width: int) -> tuple[Scheme | None, str]:
    wanted = recipe.group_size
    assert recipe.grid is not None
    size = width if wanted == -1 else wanted
    if width % size == 0:
        return Scheme(recipe.grid, size), ""
    smaller = [g for g in sorted(GROUP_SIZES[recipe.grid], reverse=True) if 0 < g < wanted and width % g == 0]
    if recipe.indivisible == "smaller" and smaller:
        return Scheme(recipe.grid, smaller[0]), f"group {wanted} does not divide {width}: {smaller[0]}"
    if recipe.indivisible == "keep":
        return None, f"group {wanted} does not divide {width}"
    instead = f"group_size={smaller[0]}, or --set indivisible=smaller" if smaller else "indivisible=keep"
    raise UsageError(f"group_size {wanted} does not divide the {width} inputs of {name}: --set {instead}")


def _head(recipe: Recipe, checkpoint: Checkpoint, family: Family, ignored: _Ignore) -> LinearPlan:
    name = family.lm_head
    tied = family.tied or not checkpoint.has(f"{name}.weight")
    out, width = _shape(checkpoint, family.embedding if tied else name)
    entry = ignored.match(name)
    if entry:
        return LinearPlan(name, None, "lm_head", name, out, width, None, f"ignore: {entry}")
    if tied:
        return LinearPlan(name, None, "lm_head", name, out, width, None, "tied to the embeddings")
    scheme, reason = _scheme(recipe, name, width)
    return LinearPlan(name, None, "lm_head", name, out, width, scheme, reason)


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    info = checkpoint.tensors.get(f"{name}.weight")
    if info is None:
        raise HalfbyteError(f"{checkpoint.path} lacks {name}.weight: is the model whole, and in BF16?")
    if info.dtype not in ("BF16", "F16", "F32") or len(info.shape) != 2:
        raise HalfbyteError(
            f"{name}.weight is {info.dtype} {list(info.shape)}: only a model in BF16, F16 or F32 is taken"
        )
    return info.shape[0], info.shape[1]
