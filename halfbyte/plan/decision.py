"""The choice of a recipe where the user names none: what loads on every platform, then what the evidence says is fast.

Rules and their sources: portable first choice GPTQ, NVFP4 first choice where every platform serves it (the strategy's
decision guide); what loads, what is advised, and speeds per concurrency (the platforms' data, with their evidence).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.platforms import Platform, SpeedRow, SpeedTable
from halfbyte.recipe.schema import Recipe

GROUPS = (128, 64, 32)
"""Group sizes of the int4 grids, by falling size: the largest that divides everything costs the fewest scales."""
MARGIN = 1.03
"""Speeds that are closer than this are called equal: the tables are medians of three."""
NVFP4 = {"method": "nvfp4", "group_size": 16}
GRID_NAMES = {"int4_sym": "symmetric int4", "int4_asym": "asymmetric int4", "nvfp4": "NVFP4"}


@dataclass
class Decision:
    """The recipe, why, what else would do, and what will not."""

    recipe: Recipe
    reasons: list[str] = field(default_factory=list)
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    avoided: list[dict[str, str]] = field(default_factory=list)


def title(recipe: Recipe) -> str:
    """A recipe in a few words: `GPTQ, symmetric int4, group 64, gptq format`."""
    grid = "" if recipe.method == "nvfp4" else f"{GRID_NAMES[str(recipe.grid)]}, "
    group = "one group a row" if recipe.group_size == -1 else f"group {recipe.group_size}"
    return f"{recipe.method.upper()}, {grid}{group}, {recipe.format} format"


def variant_of(recipe: Recipe) -> str | None:
    """What the recipe's format will declare within itself, as platforms' data and the serve command name it."""
    if recipe.format == "modelopt":
        return "NVFP4" if recipe.activations == "fp4" else "W4A16_NVFP4"
    if recipe.format == "compressed-tensors":
        return "nvfp4-pack-quantized" if recipe.grid == "nvfp4" else "pack-quantized"
    return None


def choose(widths: Sequence[int], platforms: Sequence[Platform], concurrency: int) -> Decision:
    """A recipe for a model whose linears have those input widths, served on all of `platforms`."""
    group, group_reason = _group(widths)
    gptq = _int4("gptq", group, widths)
    candidates = [gptq, _int4("awq", group, widths)]
    if platforms:
        candidates.insert(0, nvfp4_for(platforms, concurrency))
    usable, avoided = [], []
    for recipe in candidates:
        hindrances = [h for h in (hindrance(recipe, platform) for platform in platforms) if h]
        avoided += [{"title": title(recipe), "reason": h} for h in hindrances]
        fits = not any(width % recipe.group_size for width in widths)
        if not hindrances and (fits or recipe.indivisible == "keep"):
            usable.append(recipe)
    if not usable:
        avoided = [entry for entry in avoided if entry["title"] != title(gptq)]
        usable = [gptq]
    chosen, why = _first(usable, platforms, concurrency)
    decision = Decision(chosen, [why], avoided=avoided)
    if chosen.method == "nvfp4":
        decision.reasons.append("group 16 is the format's own: larger groups share scales and save no bytes")
        if chosen.activations == "fp4":
            decision.reasons.append("it declares NVFP4 with calibrated input scales, which the faster kernel asks for")
    else:
        decision.reasons.append(group_reason)
    decision.alternatives = [
        {"title": title(recipe), "recipe": recipe.identity(), "reason": _why_also(recipe, platforms, concurrency)}
        for recipe in usable
        if recipe is not chosen
    ]
    return decision


def hindrance(recipe: Recipe, platform: Platform) -> str:
    """Why that platform should not be given this recipe's format; empty where nothing speaks against it."""
    try:
        support = platform.support(recipe.format, variant_of(recipe))
    except KeyError:
        return f"nothing is known of the format {recipe.format} on {platform.name}"
    if support.loads and support.advised:
        return ""
    return f"{platform.name}: {support.reason} ({support.evidence})"


def _group(widths: Sequence[int]) -> tuple[int, str]:
    for size in GROUPS:
        if all(width % size == 0 for width in widths):
            refused = [g for g in GROUPS if g > size]
            odd = sorted({width for width in widths if any(width % g for g in refused)})
            because = f": {' and '.join(map(str, refused))} do not divide {', '.join(map(str, odd))}" if odd else ""
            because = because.replace(" do not", " does not") if len(refused) == 1 else because
            return size, f"group {size} is the largest that divides the inputs of every linear{because}"
    odd = sorted({width for width in widths if width % GROUPS[-1]})
    return GROUPS[-1], f"linears with {', '.join(map(str, odd))} inputs stay in BF16: no group size divides them"


def _int4(method: str, group: int, widths: Sequence[int]) -> Recipe:
    whole = all(width % group == 0 for width in widths)
    return Recipe.model_validate({"method": method, "group_size": group, "indivisible": "error" if whole else "keep"})


def nvfp4_for(platforms: Sequence[Platform], concurrency: int) -> Recipe:
    """NVFP4 in blocks of 16, declared so that the fastest measured kernel takes it."""
    weight_only = Recipe.model_validate(NVFP4)
    with_inputs = Recipe.model_validate({**NVFP4, "activations": "fp4"})
    gains = [[best_speed(recipe, p, concurrency) for p in platforms] for recipe in (weight_only, with_inputs)]
    faster = any(b and (not a or b[1] > a[1] * MARGIN) for a, b in zip(*gains))
    return with_inputs if faster else weight_only


def speed_table(platform: Platform) -> SpeedTable | None:
    """The platform's measured kernels for the vLLM version that its data assumes."""
    return next((table for table in platform.speed if table.covers(platform.vllm)), None)


def best_speed(recipe: Recipe, platform: Platform, concurrency: int) -> tuple[SpeedRow, float] | None:
    """The fastest measured kernel for a recipe there and its gain over BF16; None where nothing was measured."""
    table = speed_table(platform)
    rows = table.rows_for(str(recipe.format), variant_of(recipe)) if table else ()
    if not table or not rows:
        return None
    return max(((row, table.speedup(row, concurrency)) for row in rows), key=lambda pair: pair[1])


def _first(usable: Sequence[Recipe], platforms: Sequence[Platform], concurrency: int) -> tuple[Recipe, str]:
    first = usable[0]
    names = " and ".join(platform.name for platform in platforms) or "every platform"
    if first.method != "nvfp4":
        return first, f"{title(first)} is the strategy's portable choice and loads on {names}"
    for other in usable[1:]:
        for platform in platforms:
            a, b = best_speed(first, platform, concurrency), best_speed(other, platform, concurrency)
            if a and b and b[1] > a[1] * MARGIN:
                return other, (
                    f"the strategy's first choice on {names} is NVFP4, but at concurrency {concurrency} its fastest "
                    f"kernel there ({a[0].kernel}) measured {a[1]:.2f}× BF16, "
                    f"and {other.method.upper()} ({b[0].kernel}) {b[1]:.2f}×"
                )
    return first, f"NVFP4 is the strategy's first choice where every platform serves it, and {names} does"


def _why_also(recipe: Recipe, platforms: Sequence[Platform], concurrency: int) -> str:
    why = {
        "gptq": "portable to every platform that vLLM serves",
        "awq": "portable; asymmetric codes, often a little closer to BF16",
        "nvfp4": "the strategy's first choice on this hardware",
    }[recipe.method]
    told = [
        f"{best[1]:.2f}× BF16 on {platform.name} at concurrency {concurrency} ({best[0].kernel}, measured)"
        for platform in platforms
        if (best := best_speed(recipe, platform, concurrency))
    ]
    return "; ".join([why, *told])


def speed_rows(recipes: Sequence[Recipe], platform: Platform) -> dict[str, Any] | None:
    """Measured gain over BF16 of every kernel that may serve these recipes there, per concurrency; or None."""
    table = speed_table(platform)
    if table is None:
        return None
    rows = []
    for recipe in recipes:
        for row in table.rows_for(str(recipe.format), variant_of(recipe)):
            gains = {str(c): round(table.baseline.seconds[c] / s, 2) for c, s in row.seconds.items()}
            prefill = table.baseline.prefill / row.prefill if table.baseline.prefill and row.prefill else None
            flags = " ".join(f"{flag} {value}" if value else flag for flag, value in row.flags.items())
            rows.append(
                {
                    "title": title(recipe),
                    "kernel": row.kernel,
                    "flags": flags,
                    "gain": gains,
                    "prefill": None if prefill is None else round(prefill, 2),
                    "note": row.note,
                }
            )
    evidence = f"{table.evidence}, {table.evidence.shape}"
    return {"platform": platform.name, "evidence": evidence, "rows": rows} if rows else None
