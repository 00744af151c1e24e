"""Which linear is quantized how: the recipe's layer policy applied to one model, in one place for every room.

vLLM fuses linears that read the same input, so a LinearGroup shares one fate: it is quantized whole, in one
group size, or stays in BF16 whole. It fuses all experts of a block, too: gate, up and down of each share one fate.
Routers are never quantized.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.models import Checkpoint, Family, family_of
from halfbyte.plan.words import joined
from halfbyte.recipe.schema import GROUP_SIZES, Recipe
from halfbyte.types import LinearGroup, Scheme

ROUTER = "router: where a token goes must not change, and it is small"
EXPERTS_DOWN = "boundary projection: vLLM serves a block's experts as one module, so their down projections stay 4-bit"


@dataclass(frozen=True)
class LinearPlan:
    """One linear's fate. `scheme` None: it stays in BF16, and `reason` says why; else `reason` says what of the recipe
    was not followed."""

    name: str
    block: int | None
    kind: str
    fused: str
    out_features: int
    in_features: int
    scheme: Scheme | None
    reason: str


def assign(recipe: Recipe, checkpoint: Checkpoint) -> list[LinearPlan]:
    """Every linear of the model (blocks first, then lm_head where it has weights of its own), with its scheme.

    Raises UsageError where a group size does not divide (and the recipe says `error`), where an `ignore` entry
    matches nothing or only a part of a fused group; HalfbyteError where a linear has no weight.
    """
    family = family_of(checkpoint.config)
    recipe = _one_size(recipe, checkpoint, family)
    ignored = _Ignore(recipe.ignore)
    plans = []
    for index in range(family.num_blocks):
        fused: dict[str, list[LinearGroup]] = {}
        for group in family.groups_of(index):
            fused.setdefault(group.fused, []).append(group)
        for groups in fused.values():
            plans += _module(recipe, checkpoint, family, index, groups, ignored)
        plans += [_router(checkpoint, index, name, ignored) for name in family.routers(index)]
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
    names = [n for i in _kinds_of_blocks(family) for n in family.linears(i)]
    widths = {_shape(checkpoint, n)[1] for n in names}
    fitting = [g for g in (128, 64, 32) if g <= recipe.group_size and not any(w % g for w in widths)]
    return recipe.model_copy(update={"group_size": fitting[0]}) if fitting else recipe


def _kinds_of_blocks(family: Family) -> list[int]:
    """One block of each kind: the linears of the others have the same shapes."""
    dense = [i for i in range(family.num_blocks) if i not in family.sparse]
    return [*dense[:1], *family.sparse[:1]]


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
        if names[0].startswith(f"{fused}."):
            raise UsageError(
                f"ignore: {first!r} keeps a part of {fused}, all experts of which vLLM fuses: name {fused}, or none"
            )
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


def _module(
    recipe: Recipe, checkpoint: Checkpoint, family: Family, index: int, groups: list[LinearGroup], ignored: _Ignore
) -> list[LinearPlan]:
    """The linears of one module of vLLM's: a group, or the groups of all experts."""
    members = [(f"{family.block(index)}.{name}", group.kind) for group in groups for name in group.names]
    fused = f"{family.block(index)}.{groups[0].fused}"
    shapes = {name: _shape(checkpoint, name) for name, _ in members}
    widths = sorted({width for _, width in shapes.values()})
    fate, reason = _fate(recipe, family, index, groups, [*shapes], fused, widths, ignored)
    plans = []
    for name, kind in members:
        out, width = shapes[name]
        scheme = Scheme(fate.grid, width) if fate and recipe.group_size == -1 else fate
        plans.append(LinearPlan(name, index, kind, fused, out, width, scheme, reason))
    return plans


def _router(checkpoint: Checkpoint, index: int, name: str, ignored: _Ignore) -> LinearPlan:
    ignored.match(name)
    out, width = _shape(checkpoint, name)
    return LinearPlan(name, index, "router", name, out, width, None, ROUTER)


def _fate(
    recipe: Recipe,
    family: Family,
    index: int,
    groups: list[LinearGroup],
    names: list[str],
    fused: str,
    widths: list[int],
    ignored: _Ignore,
) -> tuple[Scheme | None, str]:
    entry = ignored.match_group(names, fused)
    if entry:
        return None, f"ignore: {entry}"
    edge = min(index, family.num_blocks - 1 - index) < recipe.boundary.blocks
    if edge and recipe.boundary.keep == "blocks":
        return None, "boundary block"
    note = ""
    if edge and recipe.boundary.keep == "projections" and groups[0].expert is not None:
        note = EXPERTS_DOWN
    elif edge and recipe.boundary.keep == "projections" and groups[0].kind in ("o", "down"):
        return None, "boundary projection"
    scheme, reason = _scheme(recipe, fused, widths)
    return scheme, "; ".join(filter(None, (note, reason)))


def _scheme(recipe: Recipe, name: str, widths: list[int]) -> tuple[Scheme | None, str]:
    """One scheme for linears of these input widths (with one group a row, the group size is each linear's own)."""
    wanted = recipe.group_size
    assert recipe.grid is not None
    odd = [width for width in widths if wanted != -1 and width % wanted]
    if not odd:
        return Scheme(recipe.grid, widths[0] if wanted == -1 else wanted), ""
    fitting = [g for g in sorted(GROUP_SIZES[recipe.grid], reverse=True) if 0 < g < wanted]
    smaller = [g for g in fitting if not any(width % g for width in widths)]
    if recipe.indivisible == "smaller" and smaller:
        return Scheme(recipe.grid, smaller[0]), f"group {wanted} does not divide {odd[0]}: {smaller[0]}"
    if recipe.indivisible == "keep":
        return None, f"group {wanted} does not divide {odd[0]}"
    instead = f"group_size={smaller[0]}, or --set indivisible=smaller" if smaller else "indivisible=keep"
    raise UsageError(f"group_size {wanted} does not divide the {odd[0]} inputs of {name}: --set {instead}")


def _head(recipe: Recipe, checkpoint: Checkpoint, family: Family, ignored: _Ignore) -> LinearPlan:
    name = family.lm_head
    tied = family.tied or not checkpoint.has(f"{name}.weight")
    out, width = _shape(checkpoint, family.embedding if tied else name)
    entry = ignored.match(name)
    if entry:
        return LinearPlan(name, None, "lm_head", name, out, width, None, f"ignore: {entry}")
    if tied:
        return LinearPlan(name, None, "lm_head", name, out, width, None, "tied to the embeddings")
    scheme, reason = _scheme(recipe, name, [width])
    return LinearPlan(name, None, "lm_head", name, out, width, scheme, reason)


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    info = checkpoint.tensors.get(f"{name}.weight")
    if info is None and "quantization_config" in checkpoint.config:
        raise UsageError(f"{checkpoint.path} is quantized already: name the BF16 model that it was made of")
    if info is None:
        raise HalfbyteError(f"{checkpoint.path} lacks {name}.weight: is the model whole, and in BF16?")
    if info.dtype not in ("BF16", "F16", "F32") or len(info.shape) != 2:
        raise HalfbyteError(
            f"{name}.weight is {info.dtype} {list(info.shape)}: only a model in BF16, F16 or F32 is taken"
        )
    return info.shape[0], info.shape[1]


def group_notices(recipe: Recipe, plans: Sequence[LinearPlan]) -> list[str]:
    """Where the recipe's group size does not divide, and what is done there."""
    wanted = recipe.group_size
    instead: dict[str, set[int]] = {}
    others: dict[int, set[int]] = {}
    for plan in plans:
        used = plan.scheme.group_size if plan.scheme else None
        if wanted == -1 or used == wanted or (used is None and not plan.reason.startswith("group ")):
            continue
        if plan.in_features % wanted:
            instead.setdefault(f"groups of {used}" if used else "BF16", set()).add(plan.in_features)
        elif used:
            others.setdefault(used, set()).add(plan.in_features)

    def told(widths: set[int]) -> str:
        return joined([*map(str, sorted(widths))])

    found = [f"group {wanted} does not divide {told(odd)} inputs: {what} there" for what, odd in instead.items()]
    one = "the format has one group size for all"
    return found + [f"{one}: groups of {used} for {told(even)} inputs too" for used, even in others.items()]
