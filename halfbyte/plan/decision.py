"""The choice of a recipe where the user names none: what loads on every platform, then what was measured to be fast.

Rules ask capabilities and data, never names: what loads and what is advised (the platforms' formats), which ways of
serving are to be avoided, measured speeds per concurrency, and the tier of the quality budget (guide.yaml).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.plan.rules import EVERY_FORMAT, GROUPS, GUIDE, NVFP4_BLOCKS, POLICY, Reason, Tier, data_source, guide
from halfbyte.plan.speed import (
    Model,
    best_speed,
    beyond_noise,
    comparing,
    elsewhere,
    has_rows,
    is_near,
    least_gain,
    mean_speed,
    speed_table,
    times,
)
from halfbyte.plan.words import joined, title, variant_of
from halfbyte.platforms import Avoid, Platform, SpeedTable, within
from halfbyte.recipe.schema import Recipe

NVFP4 = {"method": "nvfp4", "group_size": 16}
LEAST_GROUP = 32
WHY_ALSO = {
    "gptq": "portable to every platform that vLLM serves; bfloat16 everywhere",
    "awq": "portable; asymmetric codes, often a little closer to BF16",
    "nvfp4": "the strategy's first choice where every platform serves it",
}


@dataclass
class Decision:
    """The recipe, why, what else would do, and what will not."""

    recipe: Recipe
    reasons: list[Reason] = field(default_factory=list)
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    avoided: list[dict[str, str]] = field(default_factory=list)


def choose(
    widths: Sequence[int],
    platforms: Sequence[Platform],
    levels: Sequence[int],
    budget: float | None = None,
    experts: bool = False,
    size: Model | None = None,
) -> Decision:
    """A recipe for a model whose linears have those input widths (per rank), served on all of `platforms`.

    levels   the concurrencies it is chosen for
    budget   the stated increase of perplexity (0.05 is +5 %), or None
    experts  whether the model is a mixture of experts
    size     the model's: figures of one that is not near it are not told; None: all are
    """
    tier = guide().tier(budget)
    group, group_reason = _group(widths, tier)
    gptq = _int4("gptq", group, widths, tier)
    candidates = [gptq, _int4("awq", group, widths, tier)]
    if platforms:
        candidates.insert(0, nvfp4_for(platforms, levels, tier))
    usable, avoided = [], []
    for recipe in candidates:
        against = [entry for platform in platforms if (entry := refusal(recipe, platform, experts))]
        avoided += against
        fits = not any(width % recipe.group_size for width in widths)
        if not against and (fits or recipe.indivisible == "keep"):
            usable.append(recipe)
    if not usable:
        avoided = [entry for entry in avoided if entry["title"] != title(gptq)]
        usable = [gptq]
    chosen, why = _first(usable, platforms, levels, size)
    decision = Decision(
        chosen, [why, *_not_compared(usable, platforms, size)], avoided=[*avoided, *badly_served(usable, platforms)]
    )
    if chosen.method == "nvfp4":
        text = "group 16 is the format's own: larger groups share scales and save no bytes"
        decision.reasons.append(Reason("nvfp4-group", text, NVFP4_BLOCKS))
    else:
        decision.reasons.append(group_reason)
    decision.reasons += _layers(chosen, budget, tier)
    decision.alternatives = [_also(recipe, platforms, levels, size) for recipe in usable if recipe is not chosen]
    return decision


def refusal(recipe: Recipe, platform: Platform, experts: bool = False) -> dict[str, str] | None:
    """Why that platform should not be given this recipe's format (of a mixture of experts: for these, too), as an entry
    of `avoided`; None: it may."""
    try:
        support = platform.support(recipe.format, variant_of(recipe))
    except KeyError:
        reason, source = f"nothing is known of the format {recipe.format} there", f"{platform.name} data"
    else:
        kept_out = support.experts if experts and support.experts and not support.experts.loads else None
        if support.loads and support.advised and not kept_out:
            return None
        found = support if not (support.loads and support.advised) else kept_out or support
        reason, source = found.reason, data_source(platform.name, found.evidence)
    return {"title": title(recipe), "platform": platform.name, "rule": "format", "reason": reason, "source": source}


def hindrance(recipe: Recipe, platform: Platform, experts: bool = False) -> str:
    """The refusal in one line; empty where nothing speaks against the recipe there."""
    entry = refusal(recipe, platform, experts)
    return f"{platform.name}: {entry['reason']} [{entry['source']}]" if entry else ""


def _warnings(recipe: Recipe, platform: Platform) -> list[Avoid]:
    """What a platform's data warns of in the variant that a recipe declares, for the vLLM version assumed."""
    support = platform.formats.get(f"{recipe.format}/{variant_of(recipe)}")
    return [way for way in support.avoid if within(way.since, platform.vllm, way.before)] if support else []


def badly_served(recipes: Sequence[Recipe], platforms: Sequence[Platform]) -> list[dict[str, str]]:
    """Ways of serving these recipes' formats that the platforms' data warn of, for the vLLM version assumed."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for platform in platforms:
        for recipe in recipes:
            for key, support in platform.formats.items():
                if key.split("/")[0] != recipe.format:
                    continue
                for way in support.avoid:
                    if within(way.since, platform.vllm, way.before):
                        found[platform.name, way.what] = {
                            "title": way.what,
                            "platform": platform.name,
                            "rule": "way-of-serving",
                            "reason": f"{way.why}: {way.do}",
                            "source": data_source(platform.name, way.evidence),
                        }
    return list(found.values())


def _group(widths: Sequence[int], tier: Tier) -> tuple[int, Reason]:
    for size in tier.groups:
        if all(width % size == 0 for width in widths):
            refused = [g for g in tier.groups if g > size]
            odd = sorted({width for width in widths if any(width % g for g in refused)})
            does = "do" if len(refused) > 1 else "does"
            because = f": {joined([*map(str, refused)])} {does} not divide {joined([*map(str, odd)])}" if odd else ""
            text = f"group {size} is the largest that the budget allows and that divides every linear's inputs{because}"
            return size, Reason("group-size", text, f"{GROUPS}; {EVERY_FORMAT}")
    odd = sorted({width for width in widths if width % LEAST_GROUP})
    text = f"linears with {joined([*map(str, odd)])} inputs stay in BF16: no group size divides them"
    return LEAST_GROUP, Reason("group-size", text, EVERY_FORMAT)


def _int4(method: str, group: int, widths: Sequence[int], tier: Tier) -> Recipe:
    whole = all(width % group == 0 for width in widths)
    keys = {"method": method, "group_size": group, "indivisible": "error" if whole else "keep"}
    return Recipe.model_validate({**keys, "boundary": {"keep": tier.boundary}})


def nvfp4_for(platforms: Sequence[Platform], levels: Sequence[int], tier: Tier | None = None) -> Recipe:
    """NVFP4 in blocks of 16, declared so that the fastest measured kernel takes it; where nothing was measured, as no
    platform's data warns of."""
    keys = {**NVFP4, "boundary": {"keep": (tier or guide().tier(None)).boundary}}
    weight_only = Recipe.model_validate(keys)
    with_inputs = Recipe.model_validate({**keys, "activations": "fp4"})
    for known in platforms:
        platform = comparing(known, with_inputs, [weight_only])
        plain, other = mean_speed(weight_only, platform, levels), mean_speed(with_inputs, platform, levels)
        if not other:
            if mean_speed(with_inputs, known, levels) and not mean_speed(weight_only, known, levels):
                return with_inputs
            continue
        taken = [[best_speed(recipe, platform, level) for level in levels] for recipe in (weight_only, with_inputs)]
        least = least_gain(with_inputs, platform, levels)
        if plain and taken[0] != taken[1] and other * least >= plain:
            return with_inputs  # with a kernel of its own, which is the faster one where repeats tell
    measured = any(mean_speed(weight_only, platform, levels) for platform in platforms)
    warned = [any(_warnings(recipe, p) for p in platforms) for recipe in (weight_only, with_inputs)]
    return with_inputs if not measured and warned == [True, False] else weight_only


def _first(
    usable: Sequence[Recipe], platforms: Sequence[Platform], levels: Sequence[int], size: Model | None
) -> tuple[Recipe, Reason]:
    first = usable[0]
    names = joined([platform.name for platform in platforms]) or "every platform"
    if first.method != "nvfp4":
        return first, Reason("portable", f"{first.method.upper()} is the portable choice and loads on {names}", GUIDE)
    told, faster = f"NVFP4 is the first choice where every platform serves it: {names}", []
    deciding = [comparing(platform, first, usable[1:], size) for platform in platforms]
    for other in usable[1:]:
        name, ratios, where, against = other.method.upper(), [], [], []
        for platform in deciding:
            a, b = mean_speed(first, platform, levels), mean_speed(other, platform, levels)
            table = speed_table(platform)
            if not (a and b and table):
                continue
            ratios.append(b / a)
            least = least_gain(other, platform, levels)
            figures = _figures(table, size, levels, (name, b), (first.method.upper(), a))
            if b > a * least:
                where.append((f"on {platform.name} {figures}", table))
            elif a > b * least:
                against.append(platform.name)
            elif b > a and (size is None or is_near(table, size)):
                told += f"; on {platform.name} {figures}, which is within noise"
        if where and not against:
            faster.append((math.prod(ratios) ** (1 / len(ratios)), other, where))
        elif where:
            told += f"; {where[0][0]}, but not on {joined(against)}"
    if not faster:
        return first, Reason("nvfp4-first", told, GUIDE)
    _, other, where = max(faster, key=lambda entry: entry[0])
    text = f"the strategy's first choice on {names} is NVFP4, but {joined([figures for figures, _ in where])}"
    sources = "; ".join(dict.fromkeys(str(table.evidence) for _, table in where))
    return other, Reason("measured-faster", text, f"{GUIDE}; {sources}")


def _figures(
    table: SpeedTable,
    size: Model | None,
    levels: Sequence[int],
    one: tuple[str, float],
    other: tuple[str, float],
) -> str:
    """How two recipes compare by a measurement: with figures, where it is of a model near this one."""
    if size and not is_near(table, size):
        return f"{one[0]} measured faster than {other[0]} {elsewhere(table, size)} ({table.model.shape})"
    at = table.measured_near(levels)
    mean = "" if len(at) == 1 else " on average (geometric mean)"
    text = (
        f"{one[0]} measured {one[1]:.2f}x BF16 and {other[0]} {other[1]:.2f}x at concurrency {joined([*map(str, at)])}"
    )
    return text + mean


def _not_compared(usable: Sequence[Recipe], platforms: Sequence[Platform], size: Model | None) -> list[Reason]:
    """Measurements near the model that could have decided and did not, for want of the first choice in them."""
    found: list[Reason] = []
    if usable[0].method != "nvfp4":
        return found
    for platform in platforms:
        deciding = speed_table(comparing(platform, usable[0], usable[1:], size))
        for table in platform.speed:
            if table is deciding:
                break
            if not table.covers(platform.vllm) or (size and not is_near(table, size)):
                continue
            there = [recipe.method.upper() for recipe in usable[1:] if has_rows(table, recipe)]
            if there and not has_rows(table, usable[0]):
                first = usable[0].method.upper()
                text = (
                    f"{platform.name}: a measurement of {joined(there)} ({table.model.shape}, "
                    f"{table.date}) does not decide, for {first} is not in it: bench both in one go (--config)"
                )
                found.append(Reason("not-compared", text, str(table.evidence)))
    return found


def _layers(recipe: Recipe, budget: float | None, tier: Tier) -> list[Reason]:
    reasons = []
    if recipe.activations == "fp4":
        text = "it declares NVFP4 with calibrated input scales, which the faster kernel asks for"
        reasons.append(Reason("nvfp4-declaration", text, "measurement"))
    tight = tier.boundary != "nothing"
    if "lm_head" in recipe.ignore:
        alone = "" if tight else "; nothing else does"
        reasons.append(Reason("lm-head", f"lm_head, the most sensitive linear, stays in BF16{alone}", POLICY))
    if tight and budget is not None:
        text = f"{budget:+.1%} of perplexity is tight: o_proj and down_proj of the first and last block stay in BF16"
        reasons.append(Reason("tight-budget", text, tier.source))
    return reasons


def _also(recipe: Recipe, platforms: Sequence[Platform], levels: Sequence[int], size: Model | None) -> dict[str, Any]:
    told, sources = [WHY_ALSO[recipe.method]], [GUIDE]
    for platform in platforms:
        table = speed_table(platform, recipe.format, variant_of(recipe))
        bests = [(level, best) for level in levels if (best := best_speed(recipe, platform, level))]
        if table and bests and not table.lent and (size is None or is_near(table, size)):
            measured = {table.nearest(level): best for level, best in bests}
            gains = ", ".join(
                f"{times(gain, beyond_noise(table, row, at))} at {at}" for at, (row, gain) in measured.items()
            )
            kernels = joined([*dict.fromkeys(row.kernel for _, (row, _) in bests)])
            told.append(f"{platform.name}: {gains} ({kernels}, measured on {table.model.shape})")
            sources.append(str(table.evidence))
    return {
        "title": title(recipe),
        "recipe": recipe.identity(),
        "reason": "; ".join(told),
        "source": "; ".join(dict.fromkeys(sources)),
    }
