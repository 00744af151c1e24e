"""Where the strategy's own choice and the evidence disagree, and where its "+60-100 % tokens/s" holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from halfbyte.plan.decision import hindrance
from halfbyte.plan.rules import GUIDE, guide
from halfbyte.plan.speed import Model, best_speed, beyond_noise, elsewhere, is_near, least_gain, speed_table, times
from halfbyte.plan.words import flag_words, title, variant_of
from halfbyte.platforms import Platform, SpeedRow, SpeedTable
from halfbyte.recipe.schema import Recipe

STRATEGY_FIRST = Recipe.model_validate({"method": "nvfp4", "group_size": 16})
"""What the strategy names first where every platform serves it; declared weight-only, served with no extra flag."""


def disagreements(
    platforms: Sequence[Platform], rivals: Sequence[Recipe], levels: Sequence[int], model: Model
) -> list[dict[str, Any]]:
    """Platforms and concurrencies at which the strategy's first choice, served as it writes, is not the fastest.

    A row: platform, concurrency (that of the measurement), strategy {title, kernel, gain}, evidence [{title, kernel,
    flags, gain}] (the faster ones, fastest first), text, do, source, near (whether the measurement is; where not, gains
    are None).
    """
    if not platforms or any(hindrance(STRATEGY_FIRST, platform) for platform in platforms):
        return []
    rows = []
    for platform in platforms:
        table = speed_table(platform, STRATEGY_FIRST.format, variant_of(STRATEGY_FIRST))
        default = _default_row(table, platform) if table else None
        if not table or default is None:
            continue
        for at in table.measured_near(levels):
            row = _disagreement(platform, table, default, rivals, at, model)
            rows += [row] if row else []
    return rows


def _default_row(table: SpeedTable, platform: Platform) -> SpeedRow | None:
    """What serves the strategy's choice, with the platform's KV cache, when no flag chooses a kernel."""
    kv_cache = platform.flags.get("--kv-cache-dtype")
    rows = table.rows_for(str(STRATEGY_FIRST.format), variant_of(STRATEGY_FIRST), kv_cache)
    return next((row for row in rows if not row.flags), None)


def _disagreement(
    platform: Platform, table: SpeedTable, default: SpeedRow, rivals: Sequence[Recipe], at: int, model: Model
) -> dict[str, Any] | None:
    slow = table.speedup(default, at)
    platform = platform.model_copy(update={"speed": (table,)})  # figures of one measurement
    beyond = slow * least_gain(STRATEGY_FIRST, platform, [at])
    faster = []
    for recipe in rivals:
        best = best_speed(recipe, platform, at)
        if best and best[0] is not default and best[1] > beyond:
            faster.append((recipe, *best))
    if not faster:
        return None
    faster.sort(key=lambda entry: -entry[2])
    near = is_near(table, model)

    def told(row: SpeedRow, gain: float) -> str:
        return times(gain, beyond_noise(table, row, at))

    if near:
        text = f"measured {told(default, slow)} BF16"
        ways = [f"{_way(recipe, row)} ({told(row, gain)})" for recipe, row, gain in faster]
    else:
        text = f"is not the fastest by a measurement {elsewhere(table, model)}"
        ways = [_way(recipe, row) for recipe, row, _ in faster]
    return {
        "platform": platform.name,
        "concurrency": at,
        "strategy": {
            "title": title(STRATEGY_FIRST),
            "kernel": default.kernel,
            "gain": round(slow, 2) if near else None,
        },
        "evidence": [
            {
                "title": title(recipe),
                "kernel": row.kernel,
                "flags": flag_words(row.flags),
                "gain": round(gain, 2) if near else None,
            }
            for recipe, row, gain in faster
        ],
        "text": text,
        "do": " or ".join(ways),
        "source": f"{GUIDE}, against {table.evidence}",
        "near": near,
    }


def _way(recipe: Recipe, row: SpeedRow) -> str:
    name = recipe.method.upper()
    if row.flags:
        return f"{name} served with {flag_words(row.flags)}"
    return f"{name} with {row.kernel}"


def promise(speed: Sequence[dict[str, Any]], levels: Sequence[int]) -> list[dict[str, Any]]:
    """For every platform, where the best kernel of the chosen recipe keeps the strategy's "+60-100 %".

    A row: platform, holds, fails, unknown (concurrencies), slower (than BF16, as far as repeats tell), basis (by
    concurrency), text, source.
    """
    low, rows = 1 + guide().speed_gain.low, []
    for table in speed:
        best = {str(gain["concurrency"]): gain for gain in table["served"]}
        found: dict[str, list[int]] = {"holds": [], "fails": [], "unknown": [], "slower": []}
        for level in levels:
            gain = best[str(level)]["gain"] if str(level) in best else None
            key = "unknown" if gain is None else "holds" if gain >= low else "fails"
            found[key].append(level)
            if gain is not None and gain < 1 and best[str(level)]["told"] is not False:
                found["slower"].append(level)
        bases = {level: entry["basis"] for level, entry in best.items()}
        guessed = bool(bases) and "measured" not in bases.values()
        row = {"platform": table["platform"], **found, "basis": bases, "text": _told(found, guessed)}
        rows.append({**row, "source": guide().speed_gain.source})
    return rows


def _told(found: dict[str, list[int]], guessed: bool) -> str:
    def at(key: str) -> str:
        return ", ".join(map(str, found[key]))

    parts = []
    if found["holds"]:
        parts.append(f"holds at concurrency {at('holds')}")
    if found["fails"]:
        parts.append(f"does not hold at {at('fails')}" if parts else f"does not hold at concurrency {at('fails')}")
    if found["slower"]:
        parts.append(f"at {at('slower')} it is slower than BF16, and what is gained is memory")
    if found["unknown"]:
        parts.append(f"no figure for concurrency {at('unknown')}: bench before you rely on a gain")
    if guessed and len(found["unknown"]) < sum(map(len, found.values())):
        parts[0] += " (by the roofline)"
    return "; ".join(parts)
