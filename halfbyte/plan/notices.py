"""What a user should know before the work begins: where strategy and vLLM's facts disagree, and what will hinder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.plan.decision import best_speed, hindrance, speed_table, variant_of
from halfbyte.plan.inventory import Footprint
from halfbyte.platforms import Platform, facts_for
from halfbyte.recipe.schema import Recipe
from halfbyte.types import NVFP4_BLOCK


def notices(
    recipe: Recipe,
    linears: Sequence[Footprint],
    model: dict[str, Any],
    platforms: Sequence[Platform],
    context: int | None,
    concurrency: int,
    text_given: bool,
) -> list[str]:
    """Every notice, each one sentence, the most important first."""
    found = [f"do not serve this on {h}" for h in (hindrance(recipe, platform) for platform in platforms) if h]
    for platform in platforms:
        found += _multiples(recipe, linears, platform)
    limit = model["context_limit"]
    if context and limit and context > limit:
        found.append(f"a context of {context:,} is beyond the {limit:,} positions of this model")
    found += _shared_scales(recipe, linears)
    for platform in platforms:
        found += _kernels(recipe, platform, concurrency)
    if not any(linear.plan.scheme for linear in linears):
        found.append("nothing is quantized: every linear is exempt")
    if model["tied"]:
        found.append("lm_head is tied to the embeddings, so it stays in BF16 and exempting it adds no bytes")
    if recipe.needs_calibration and not text_given:
        found.append("no text was given: the model writes its own calibration text; your own (--text) is better")
    return found + _spellings(platforms)


def _shared_scales(recipe: Recipe, linears: Sequence[Footprint]) -> list[str]:
    sizes = sorted({p.scheme.group_size for p in (linear.plan for linear in linears) if p.scheme})
    shared = [size for size in sizes if recipe.grid == "nvfp4" and size > NVFP4_BLOCK]
    if not shared:
        return []
    blocks = " and ".join(str(size // NVFP4_BLOCK) for size in shared)
    groups = " and ".join(map(str, shared))
    return [
        f"NVFP4 stores a scale for every {NVFP4_BLOCK} weights: group {groups} gives {blocks} neighbouring blocks "
        f"the same scale, which saves no bytes and no time over group {NVFP4_BLOCK}, and loses quality"
    ]


def _multiples(recipe: Recipe, linears: Sequence[Footprint], platform: Platform) -> list[str]:
    try:
        support = platform.support(recipe.format, variant_of(recipe))
    except KeyError:
        return []
    fused: dict[str, list[Footprint]] = {}
    for linear in linears:
        if linear.plan.scheme:
            fused.setdefault(linear.plan.fused, []).append(linear)
    odd = [
        name
        for name, group in fused.items()
        if group[0].plan.in_features % support.in_multiple
        or sum(linear.plan.out_features for linear in group) % support.out_multiple
    ]
    if not odd:
        return []
    return [
        f"{platform.name}: its kernel wants inputs in multiples of {support.in_multiple} and outputs of "
        f"{support.out_multiple}, which {odd[0]}{f' and {len(odd) - 1} more' if len(odd) > 1 else ''} cannot give: "
        "keep such linears in BF16 with ignore"
    ]


def _kernels(recipe: Recipe, platform: Platform, concurrency: int) -> list[str]:
    table, best = speed_table(platform), best_speed(recipe, platform, concurrency)
    if table is None or best is None:
        return []
    found = []
    row, gain = best
    default = [r for r in table.rows_for(str(recipe.format), variant_of(recipe)) if not r.flags]
    if row.flags and default:
        slow = table.speedup(default[0], concurrency)
        flags = " ".join(f"{flag} {value}" if value else flag for flag, value in row.flags.items())
        at = table.nearest(concurrency)
        found.append(
            f"{platform.name}: serve with {flags} ({row.kernel}, measured {gain:.2f}× BF16 at concurrency {at}); "
            f"without it vLLM takes {default[0].kernel}, {slow:.2f}×"
        )
    slower = [c for c, s in row.seconds.items() if s > table.baseline.seconds[c]]
    if slower:
        where = ", ".join(map(str, slower))
        found.append(
            f"{platform.name}: at concurrency {where} even {row.kernel} measured slower than BF16; "
            "what is gained there is memory"
        )
    return found


def _spellings(platforms: Sequence[Platform]) -> list[str]:
    known = [facts_for(p.vllm).misnomers for p in platforms if p.capabilities.accelerator]
    wrong = {flag: value for misnomers in known for flag, value in misnomers.items() if flag.endswith("bf16")}
    if not wrong:
        return []
    spelled = ", ".join(f"{flag} as {value}" for flag, value in wrong.items())
    return [f"the strategy's flags, as vLLM spells them: {spelled}; no --quantization, which vLLM reads from the files"]
