"""Which kernel vLLM takes for each linear of a recipe on a platform, and where it falls back to a later one."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.plan.inventory import Footprint
from halfbyte.plan.layers import LinearPlan
from halfbyte.plan.parallel import rank_shape
from halfbyte.plan.rules import Reason, data_source
from halfbyte.plan.words import joined, variant_of
from halfbyte.platforms import FormatSupport, Platform
from halfbyte.recipe.schema import Recipe


def fall_backs(recipe: Recipe, linears: Sequence[Footprint], platform: Platform, tp: int) -> list[Reason]:
    """A notice for linears that no kernel takes, or for those that the first kernel passes on to a later one."""
    try:
        support = platform.support(recipe.format, variant_of(recipe))
    except KeyError:
        return []
    groups = _fused(linears)
    odd = [name for name, group in groups.items() if not _fits(support, *rank_shape(group, tp))]
    if odd:
        rest = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        text = (
            f"{platform.name}: its kernel wants inputs in multiples of {support.in_multiple} and outputs of "
            f"{support.out_multiple}, which {odd[0]}{rest} cannot give: keep such linears in BF16 with ignore"
        )
        return [Reason("multiples", text, data_source(platform.name, support.evidence))]
    return _passed_on(recipe, support, groups, platform, tp)


def _passed_on(
    recipe: Recipe, support: FormatSupport, groups: dict[str, list[LinearPlan]], platform: Platform, tp: int
) -> list[Reason]:
    kernels = support.kernels_in(platform.vllm)
    dtype = str({**platform.flags, **support.flags}.get("--dtype") or "bfloat16")
    passed: dict[tuple[str, str], list[str]] = {}
    for name, group in groups.items():
        out, width = rank_shape(group, tp)
        assert group[0].scheme is not None
        size = -1 if recipe.group_size == -1 else group[0].scheme.group_size
        refusals = [kernel.refuses(width, out, size, dtype) for kernel in kernels]
        if refusals and refusals[0]:
            taker = next((k.name for k, refused in zip(kernels, refusals) if not refused), "a kernel not known here")
            passed.setdefault((taker, refusals[0]), []).append(name)
    found = []
    for (taker, why), names in passed.items():
        kinds = joined(sorted({name.rsplit(".", 1)[-1] for name in names}))
        text = f"{platform.name}: {kinds} fall back from {kernels[0].name} to {taker} ({why})"
        found.append(Reason("fall-back", text, data_source(platform.name, support.evidence)))
    return found


def _fused(linears: Sequence[Footprint]) -> dict[str, list[LinearPlan]]:
    groups: dict[str, list[LinearPlan]] = {}
    for plan in (linear.plan for linear in linears):
        if plan.scheme:
            groups.setdefault(plan.fused, []).append(plan)
    return groups


def _fits(support: FormatSupport, out: int, width: int) -> bool:
    return width % support.in_multiple == 0 and out % support.out_multiple == 0
